"""What a video may start from: a picture, or the end of a clip. Both are latents, held fixed through `x_mask`.

Legend: C latent channels, h×w latent grid, o latents of the overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arlon_ray.bundle import Bundle
from arlon_ray.config import GROUP_FRAMES
from arlon_ray.models.vae import to_video


@dataclass(frozen=True)
class Given:
    """Latents float32 [C, n, h, w] that the first segment starts with: n = 1 for a picture, o for the end of a clip.

    `shown`: whether they are part of the new video (a picture is its first frame; a clip went before it).
    """

    latents: np.ndarray
    shown: bool


def same_given(one: Given | None, other: Given | None) -> bool:
    """Whether two are of the same pictures, as far as can be told: they may have been encoded on other machines."""
    if one is None or other is None:
        return one is other
    alike = one.latents.shape == other.latents.shape and np.allclose(one.latents, other.latents, atol=1e-2)
    return alike and one.shown == other.shown


def given_picture(bundle: Bundle, frame: np.ndarray) -> Given:
    """A picture uint8 [H, W, 3] of the bundle's size as the first frame. Raises ValueError for another size."""
    return Given(_encode(bundle, frame[None]), shown=True)


def given_clip(bundle: Bundle, frames: np.ndarray) -> Given:
    """The end of a clip uint8 [T, H, W, 3] of the bundle's size and rate: the video goes on from there.

    Raises ValueError for another size, or for fewer frames than one segment hands to the next.
    """
    needed = bundle.config.segment.overlap_groups * GROUP_FRAMES
    if len(frames) < needed:
        raise ValueError(
            f"the clip has {len(frames)} frames at {bundle.config.video.fps:g} a second: expected at least {needed}"
        )
    return Given(_encode(bundle, frames[-needed:]), shown=False)


def _encode(bundle: Bundle, frames: np.ndarray) -> np.ndarray:
    size = (bundle.config.video.height, bundle.config.video.width)
    if frames.dtype != np.uint8 or frames.shape[1:] != (*size, 3):
        raise ValueError(f"frames of {frames.dtype} {list(frames.shape)}: expected uint8 [T, {size[0]}, {size[1]}, 3]")
    with bundle.at_work(bundle.vae):
        return bundle.vae.encode(to_video(frames[None], bundle.device))[0].float().cpu().numpy()
