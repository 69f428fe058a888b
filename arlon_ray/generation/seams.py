"""Borders between the VAE's groups of frames, which are decoded each on its own, made to show less.

What jumps at a border is taken back in the first n frames behind it, less and less: w_k = 1 − (k + 1)/(n + 1) of it in
the k-th. First the motion: where the picture goes on from the last frame before the border to the first one behind it,
less how far it moves in one frame of the new group, is how far the new group has jumped; its frames are drawn back by
that much. Then the colours: the last frame, carried along the optical flow, is blended in. Both are times exp(−(d/σ)²)
where the two sides differ by d grey levels, so that what is really new (a cut, an object that comes out) stays. It
needs no training and works with any VAE; what it does to joins and to the error against true frames is in
docs/long_video.md. cv2 is imported where it is used.

Legend: H × W pixels; places and motions are (x, y).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.flow import DenseFlow

#: Grey levels by which two sides of a border may differ to count as the same thing.
SIGMA = 40.0
#: Frames of the new group that its motion is taken from: none of them the first, which has a latent of its own.
MOTION = (1, 5)
#: Pixels over which jumps are smoothed: neighbours jump together.
SMOOTH = 2.0

Frames = NDArray[np.uint8]
Field = NDArray[np.float32]


def blend_seams(frames: Frames, before: Frames | None, count: int) -> Frames:
    """Take back, in the first `count` frames of each group of uint8 [T, H, W, 3], what jumps at the border before it.

    `before` [H, W, 3] is the frame before the first one; None: there is none. `count` is below the frames of a group,
    so that the last frame of a group is always as it was decoded.
    """
    blended = frames.copy() if count else frames
    for start in range(0, len(frames) if count else 0, GROUP_FRAMES):
        last = frames[start - 1] if start else before
        if last is not None:
            group = frames[start : start + GROUP_FRAMES]
            blended[start : start + count] = _joined(last, group, count)
    return blended


def _joined(last: Frames, group: Frames, count: int) -> Frames:
    """The first `count` frames of a group, as they follow the last one before it."""
    height, width, _ = last.shape
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    flow, picture = DenseFlow(height, width, to_carry=True), last.astype(np.float32)
    grey, greys = flow.grey(last), [flow.grey(frame) for frame in group[: max(count, *MOTION) + 1]]
    first, second = (min(at, len(greys) - 1) for at in MOTION)
    motion = flow.between(greys[first], greys[second]) / np.float32(max(1, second - first))
    jump = _jump(picture, group[0], flow.between(grey, greys[0]), motion, places)
    joined = np.empty_like(group[:count])
    for k, frame in enumerate(group[:count]):
        weight = 1 - (k + 1) / (count + 1)
        back = flow.between(greys[k], grey)
        drawn = places + weight * _at(jump, places + back)
        shown, carried = _at(frame, drawn), _at(picture, drawn + _at(back, drawn))
        joined[k] = (shown + weight * _alike(carried, shown) * (carried - shown)).round().clip(0, 255)
    return joined


def _jump(picture: Field, frame: Frames, forth: Field, motion: Field, places: Field) -> Field:
    """How far [H, W, 2] what `picture` shows has jumped, beyond its `motion`: `frame` shows it `forth` from there."""
    import cv2

    there = places + forth
    jump = (forth - _at(motion, there)) * _alike(_at(frame, there), picture)
    return np.asarray(cv2.GaussianBlur(jump, (0, 0), SMOOTH), np.float32)


def _alike(one: Field, other: Field) -> Field:
    """[H, W, 1]: 1 where two pictures show the same, towards 0 where they do not."""
    return np.exp(-np.square(np.abs(one - other).mean(-1, keepdims=True) / SIGMA))


def _at(picture: Any, places: Field) -> Field:
    """What a picture, or a field, shows at these places."""
    import cv2

    options: Any = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_REPLICATE}
    return np.asarray(cv2.remap(np.asarray(picture, np.float32), places, None, **options), np.float32)  # type: ignore[call-overload]
