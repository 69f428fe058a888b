"""Borders between the VAE's groups of frames, which are decoded each on its own, made to show less.

The picture before a border is carried on along the optical flow and blended into the first frames behind it, less and
less: w_k = 1 − (k + 1)/(n + 1) for the k-th of n frames, times exp(−(d/σ)²) where the two differ by d grey levels, so
that what is really new (a cut, an object that comes out) stays. It needs no training and works with any VAE; what it
does to the error against true frames and to joins is in docs/long_video.md. cv2 is imported where it is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.flow import Grey, flow_between, grey_of

#: Grey levels by which the carried-on picture may differ from a frame to count as the same thing.
SIGMA = 40.0

Frames = NDArray[np.uint8]


def blend_seams(frames: Frames, before: Frames | None, count: int) -> Frames:
    """Blend into the first `count` frames of each group of uint8 [T, H, W, 3] what the frame before it shows.

    `before` [H, W, 3] is the frame before the first one; None: there is none. `count` is below the frames of a group,
    so that the last frame of a group is always as it was decoded.
    """
    blended = frames.copy() if count else frames
    for start in range(0, len(frames) if count else 0, GROUP_FRAMES):
        last = frames[start - 1] if start else before
        if last is None:
            continue
        grey = grey_of(last)
        for k in range(min(count, len(frames) - start)):
            frame = frames[start + k].astype(np.float32)
            carried = _carried(last, grey, frames[start + k]).astype(np.float32)
            unlike = np.abs(carried - frame).mean(-1, keepdims=True) / SIGMA
            weight = (1 - (k + 1) / (count + 1)) * np.exp(-np.square(unlike))
            blended[start + k] = (frame + weight * (carried - frame)).round().clip(0, 255)
    return blended


def _carried(picture: Frames, grey: Grey, to: Frames) -> Frames:
    """What `picture`, whose grey is known, looks like where its parts are in `to`."""
    import cv2

    height, width = to.shape[:2]
    flow = flow_between(grey_of(to), grey, (height, width), fast=True)
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    options: Any = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
    return np.asarray(cv2.remap(picture, grid + flow, None, **options), np.uint8)  # type: ignore[call-overload]
