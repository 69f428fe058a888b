"""Buckets by aspect ratio, as in Open-Sora v1.2: one area, several shapes; a clip goes to the shape nearest its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from arlon_ray.config import ConfigError, DataConfig, VideoConfig

#: Pixels of a side of one latent.
LATENT_PIXELS = 8


def shapes(video: VideoConfig, data: DataConfig) -> list[tuple[int, int]]:
    """(height, width) of every bucket, in pixels: `video`'s own, or one for each of `data.aspect_ratios`.

    Each has about the area of `video` and sides of whole latents. Raises ConfigError where two ratios come to the same
    shape.
    """
    if not data.aspect_ratios:
        return [(video.height, video.width)]
    found: dict[tuple[int, int], str] = {}
    for ratio in data.aspect_ratios:
        width, height = map(int, ratio.split(":"))
        scale = math.sqrt(video.height * video.width / (width * height))
        shape = (_rounded(height * scale), _rounded(width * scale))
        if (other := found.setdefault(shape, ratio)) != ratio:
            raise ConfigError(
                f"data.aspect_ratios: {other} and {ratio} both come to {shape[1]}×{shape[0]} pixels (steps of "
                f"{LATENT_PIXELS}): leave one out, or make video.height × video.width larger"
            )
    return list(found)


def nearest(shown: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest that of (height, width), by the ratio of the two."""
    return min(buckets, key=lambda shape: abs(math.log(shape[1] / shape[0] * shown[0] / shown[1])))


def _rounded(size: float) -> int:
    return max(1, round(size / LATENT_PIXELS)) * LATENT_PIXELS
