"""Row function: a clip row → its frames, uint8 [T,H,W,3], at the size and rate that the row asks for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from data_pipeline import schema
from data_pipeline.footage import FootageError, open_footage, read_frames
from data_pipeline.schema import Row, one_line

#: Frames that are held at the file's own size at the same time.
CHUNK_FRAMES = 17


def frame_indices(times_s: NDArray[np.float64], start_s: float, count: int, fps: float) -> NDArray[np.int64]:
    """The frames on screen at `start_s`, `start_s` + 1/`fps`, … ([count]); `times_s` as in `Footage`."""
    # half a frame on: a time stamp that is rounded up must not show the frame before
    moments = start_s + (np.arange(count) + 0.5) / fps
    shown = np.searchsorted(times_s[:-1], moments, side="right") - 1
    return np.clip(shown, 0, len(times_s) - 2).astype(np.int64)


def fit(frames: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """[T,H,W,3] scaled, aspect kept, until it covers height × width, then cut to the centre."""
    old_height, old_width = frames.shape[1:3]
    if (old_height, old_width) == (height, width):
        return frames
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cut = pixels[:, :, top : top + height, left : left + width]
    return cut.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


class Clip:
    """A whole video at another size and rate, read part by part: memory does not grow with its length."""

    def __init__(self, path: str, height: int, width: int, fps: float) -> None:
        """Raises FootageError if the file cannot be read, or is shorter than a frame."""
        self.path, self.size, self.fps = path, (height, width), fps
        self.frames = int(float(open_footage(path).times_s[-1]) * fps + 1e-6)
        if not self.frames:
            raise FootageError(schema.UNREADABLE, f"shorter than a frame at {fps:g} frames a second")

    def read(self, first: int, count: int) -> NDArray[np.uint8]:
        """Frames [count,H,W,3] from frame `first` on. Raises as `decode_clip` does."""
        row = {"uri": self.path, "start_s": first / self.fps, "num_frames": count, "fps": self.fps}
        return decode_clip({**row, "height": self.size[0], "width": self.size[1]})

    def parts(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """All frames, `count` at a time."""
        for first in range(0, self.frames, count):
            yield self.read(first, min(count, self.frames - first))


def decode_clip(row: Row, threads: int = 1) -> NDArray[np.uint8]:
    """The frames of a clip row, [T,H,W,3]. Raises FootageError or what the reader raises on damaged data."""
    footage = open_footage(row["uri"], threads)
    indices = frame_indices(footage.times_s, row["start_s"], row["num_frames"], row["fps"])
    chunks = [
        fit(
            read_frames(row["uri"], footage, indices[first : first + CHUNK_FRAMES], threads),
            row["height"],
            row["width"],
        )
        for first in range(0, len(indices), CHUNK_FRAMES)
    ]
    return np.concatenate(chunks)


def decode_row(row: Row, threads: int = 1) -> Row:
    """A clip row → a row of `schema.DECODED`. Never raises: the error becomes the row's reason."""
    try:
        return {**row, "frames": decode_clip(row, threads).tobytes(), "reason": "", "error": ""}
    except Exception as error:
        message = one_line(f"{type(error).__name__}: {error}")
        return {**row, "frames": b"", "reason": schema.DECODE_FAILED, "error": message}
