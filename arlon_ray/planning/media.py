"""What reading and writing video files is counted as: pixels instead of operations.

`traffic` are pixels of the file, `calls` files or fragments. `products` are pixels of the frames that are made of a
file that is read, and frames of one that is written.
"""

from __future__ import annotations

from arlon_ray.planning.counts import Work


def clip_work(file_frames: float, file_pixels: float, frames: float, pixels: float) -> Work:
    """Reading so many frames of a file, and scaling and scoring `frames` of them."""
    return Work(products=frames * pixels, traffic=file_frames * file_pixels, calls=1)


def fragment_work(frames: int, pixels: int) -> Work:
    """Writing one fragment of mp4."""
    return Work(products=frames, traffic=frames * pixels, calls=1)
