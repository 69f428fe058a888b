"""How well segments of a long video join, and how far it drifts: figures of any footage, rendered or real.

join_difference   mean |f_{t+1} − f_t| over the pixels, at the joins over that inside of groups.
join_colour       the same of the picture's mean colour, |mean f_{t+1} − mean f_t| over the channels.
join_flow         the same of the jump of optical flow, mean |u_t − u_{t−1}| (u_t from frame t to t + 1).
                  1: nothing shows where a segment begins. All sums are over the joins before they are divided.
seam_…            the same at the VAE's borders between groups which are no joins: the floor for the joins.
drift_quality     imaging_quality of the last segment over that of the first.
drift_colour      distance of mean and standard deviation of the colours of the last segment from those of the first,
                  of 255.
drift_subject     cosine of what the object looks like, averaged over the last segment and over the first: of 8×8
                  fields, in each of which one pixel of the object counts as much as all.
drift_look        the same of fields that count by what the object covers of them.

Legend: T frames, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.metrics import around_object, optical_flow, sharpness
from arlon_ray.evaluation.scenes import Frames, object_masks

#: Frames on both sides of a border that do not count as inside.
NEAR = 1
#: What a figure inside of groups is at least: below it nothing moves, and a ratio says nothing (of 255; of a pixel).
STILL_LEVEL, STILL_FLOW = 0.05, 0.005


def join_figures(frames: Frames, joins: Sequence[int]) -> dict[str, float]:
    """Ratios of uint8 [T, H, W, 3] at `joins`, the first frames of later segments, and at the other groups' borders.

    Raises ValueError if a group has no frames inside, away from its borders.
    """
    changes = _changes(frames)
    borders = set(range(GROUP_FRAMES, len(frames), GROUP_FRAMES)) | set(joins)
    near = {at + offset for at in borders for offset in range(-NEAR, NEAR + 1)}
    inside = [t for t in range(2, len(frames) - 1) if t not in near]
    if not inside:
        raise ValueError(f"{len(frames)} frames with borders at {sorted(borders)}: none is inside of a group")
    seams = sorted(borders - set(joins))
    figures = {}
    for name, (change, least) in changes.items():
        level = max(least, _mean(change, inside))
        for place, where in (("join", joins), ("seam", seams)):
            if where:
                figures[f"{place}_{name}"] = _mean(change, where) / level
    return figures


def drift_figures(frames: Frames, joins: Sequence[int]) -> dict[str, float]:
    """The last segment beside the first, of uint8 [T, H, W, 3]."""
    first, last = frames[: joins[0]], frames[joins[-1] :]
    masks = [object_masks(part) for part in (first, last)]
    quality = [sharpness(part, mask) for part, mask in zip((first, last), masks, strict=True)]
    subjects, looks = (
        [around_object(part, mask, covered).mean(0) for part, mask in zip((first, last), masks, strict=True)]
        for covered in (False, True)
    )
    statistics = [_colours(part) for part in (first, last)]
    return {
        "drift_quality": quality[1] / max(quality[0], 1e-6),
        "drift_colour": float(np.abs(statistics[1] - statistics[0]).mean() / 255),
        "drift_subject": _cosine(*subjects),
        "drift_look": _cosine(*looks),
    }


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Of two vectors; 0 if one of them is nothing."""
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.dot(one, other) / norms) if norms else 0.0


Change = Callable[[int], float]


def _changes(frames: Frames) -> dict[str, tuple[Change, float]]:
    """What changes from frame t − 1 to t, each figure with its least level; the flow's jump may be on either side."""
    levels = frames.astype(np.float32)
    means = levels.mean((1, 2))
    flow = optical_flow(frames)
    jumps = np.linalg.norm(np.diff(flow, axis=0), axis=-1).mean((1, 2))  # jumps[t]: at frame t + 1

    return {
        "difference": (lambda t: float(np.abs(levels[t] - levels[t - 1]).mean()), STILL_LEVEL),
        "colour": (lambda t: float(np.abs(means[t] - means[t - 1]).mean()), STILL_LEVEL),
        # into the border, and out of it again
        "flow": (lambda t: float((jumps[t - 2] + jumps[min(t - 1, len(jumps) - 1)]) / 2), STILL_FLOW),
    }


def _mean(change: Change, where: Iterable[int]) -> float:
    return float(np.mean([change(t) for t in where]))


def _colours(frames: Frames) -> NDArray[np.float64]:
    """Mean and standard deviation of each channel."""
    levels = frames.astype(np.float64)
    return np.concatenate([levels.mean((0, 1, 2)), levels.std((0, 1, 2))])
