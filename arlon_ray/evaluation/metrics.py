"""Metrics of one video, named after VBench's dimensions (Huang et al., CVPR 2024), 0 to 1, larger is better.

VBench's formulas where they need no large network; where it takes features or flow from one, ours are stated here and
can be exchanged: a difference between two models means the same, an absolute value is not VBench's.

subject_consistency     VBench: cosine of DINO features with the first and the previous frame.
                        Here: 8×8 colours around the object, which is turned to the middle.
background_consistency  VBench: the same with CLIP. Here: 8×8 colours of what is not object.
temporal_flickering     VBench: 1 − mean absolute difference of neighbouring frames / 255. Here: where nothing moves.
motion_smoothness       VBench: 1 − error / 255 of frames interpolated by AMT. Here: along optical flow (DIS).
dynamic_degree          VBench: whether the largest 5 % of RAFT's flow exceed a threshold. Here: of DIS flow, its
                        mean over five frames (what trembles has no direction), where there is something to follow,
                        and of all pairs of frames together (VBench: a share of the pairs is enough).
imaging_quality         VBench: MUSIQ. Here: how sharply objects end, against a rendered edge.
object_class, colour    VBench: a detector finds what is named. Here: every shape (colour) of the truth is seen.
multiple_objects        VBench: all that is named is in one frame. Here: as many objects as there are, of these very
                        pairs of colour and shape.
spatial_relationship    VBench: positions of detected boxes. Here: of the objects' centres; only where one is named.
action                  VBench: UMT's class. Here: what every object does, with its direction and speed.
                        Beside it `direction` alone, and `presence`, the share of frames with an object.
                        The last five are readings of pixels against the scene's truth (`scenes.py`).
persistence             Ours, of videos of several segments: share of joins with the same objects (colour, shape,
                        number) read in the group of frames before and in the one after.

Legend: T frames, H × W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.scenes import (
    SIMPLE_ACTIONS,
    Frames,
    Mask,
    Reading,
    Seen,
    centre_of,
    grown,
    object_masks,
    read_relation,
    read_scene,
    rim,
)
from arlon_ray.evaluation.world import ACTIONS, RELATIONS, Deed, Shot, deed_of
from arlon_ray.flow import DenseFlow

Features = NDArray[np.float64]

POOL = 8
#: VBench: a top-5 % flow of 6 pixels at 256, between frames of 8 a second.
DYNAMIC_PIXELS, DYNAMIC_SIDE, DYNAMIC_FPS = 6.0, 256, 8.0
#: Steps that flow is averaged over, and grey levels a pixel from which it can be followed.
STEADY, FLAT = 5, 4.0


#: VBench's eleven, in the order of the tables.
DIMENSIONS = (
    "object_class", "colour", "multiple_objects", "spatial_relationship", "action", "subject_consistency",
    "background_consistency", "temporal_flickering", "motion_smoothness", "dynamic_degree", "imaging_quality",
)  # fmt: skip


def measure(frames: Frames, truth: Shot | None, fps: float, joins: Sequence[int] = ()) -> dict[str, float]:
    """All metrics of uint8 [T, H, W, 3]; those of meaning only with a truth, and persistence only with `joins`.

    `joins` are the first frames of later segments. Raises ValueError as `read_scene` does.
    """
    masks, flow = object_masks(frames), optical_flow(frames)
    values = {
        "subject_consistency": consistency(around_object(frames, masks)),
        "background_consistency": consistency(_pooled(frames, ~grown(masks))),
        "temporal_flickering": flickering(frames, masks),
        "motion_smoothness": smoothness(frames, flow),
        "dynamic_degree": float(dynamic(steady(flow, frames), frames.shape[1:3], fps)),
        "imaging_quality": sharpness(frames, masks),
    }
    if joins:
        values["persistence"] = persistence(frames, joins)
    return values if truth is None else {**meaning(frames, truth), **values}


def persistence(frames: Frames, joins: Sequence[int]) -> float:
    """Share of `joins` with the same objects in the group of frames before and in the one after."""
    # what comes after one join may come before the next: every group is read once
    objects = cache(lambda first: _objects(read_scene(frames[first : first + GROUP_FRAMES])))
    return float(np.mean([objects(at - GROUP_FRAMES) == objects(at) for at in joins]))


def _objects(read: Reading) -> list[tuple[str, str]]:
    """(colour, shape) of every object, in order."""
    return sorted((seen.colour, seen.shape) for seen in read.things for _ in range(seen.count))


def meaning(frames: Frames, truth: Shot) -> dict[str, float]:
    """Whether the video shows what it should: 1 or 0 for each (and `presence`). No relation in the truth, no figure."""
    # a world without a camera and actions is read as such: the truth says which it is
    simple = all(thing.action in SIMPLE_ACTIONS for thing in truth.things) and truth.pan == "still"
    read = read_scene(frames, SIMPLE_ACTIONS if simple else ACTIONS)
    by_colour = {seen.colour: seen for seen in read.things}
    wanted, found = [(thing.colour, thing.shape) for thing in truth.things], _objects(read)
    done = [by_colour[thing.colour].deed if thing.colour in by_colour else None for thing in truth.things]
    deeds = [deed_of(thing) for thing in truth.things]
    values = {
        "object_class": float({shape for _, shape in wanted} <= {shape for _, shape in found}),
        "colour": float({colour for colour, _ in wanted} <= {colour for colour, _ in found}),
        "multiple_objects": float(sorted(wanted) == found),
        "action": float(all(seen is not None and _alike(seen, deed) for seen, deed in zip(done, deeds, strict=True))),
        "direction": float(
            all(seen is not None and seen.direction == deed.direction for seen, deed in zip(done, deeds, strict=True))
        ),
        "presence": read.presence,
    }
    if truth.relation is not None:
        pair = [by_colour.get(thing.colour) for thing in truth.things[:2]]
        values["spatial_relationship"] = float(_related(pair[0], pair[1], truth.relation, frames.shape[1:3]))
    return values


def _alike(seen: Deed, deed: Deed) -> bool:
    """Equal; what a caption names no speed of may have any."""
    return seen == deed or (deed.speed is None and seen.action == deed.action and seen.direction == deed.direction)


def _related(first: Seen | None, second: Seen | None, relation: str, size: tuple[int, ...]) -> bool:
    """Whether the first is on that side of the second, more than it is above or beside it."""
    if first is None or second is None:
        return False
    x, y = read_relation(first, second, (size[0], size[1]))
    side_x, side_y = RELATIONS[relation]
    return side_x * x + side_y * y > abs(side_x * y - side_y * x)


def consistency(features_TF: Features) -> float:
    """Mean over t of ½·(cos(f_1, f_t) + cos(f_{t−1}, f_t)), not below 0 (VBench: neither of them is)."""
    norms = np.linalg.norm(features_TF, axis=1, keepdims=True)
    unit = np.divide(features_TF, norms, out=np.zeros_like(features_TF), where=norms > 0)
    to_first, to_previous = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(1)
    return float(np.clip((to_first + to_previous) / 2, 0, 1).mean())


def flickering(frames: Frames, masks: Mask) -> float:
    """1 − mean |f_t − f_{t+1}| / 255 over pixels that no object touches."""
    touched = grown(masks)
    calm = ~(touched[:-1] | touched[1:])
    if not calm.any():
        return 0.0
    return float(1 - np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(3)[calm].mean() / 255)


def smoothness(frames: Frames, flow: NDArray[np.float32]) -> float:
    """1 − mean error / 255 of every second frame interpolated between its neighbours, half way along their flow."""
    import cv2

    height, width = frames.shape[1:3]
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
    errors = []
    for t in range(1, len(frames) - 1, 2):
        half = (flow[t - 1] + flow[t]) / 2
        options = {"interpolation": cv2.INTER_LINEAR, "borderMode": cv2.BORDER_WRAP}
        before = cv2.remap(frames[t - 1], grid - half, None, **options)  # type: ignore[call-overload]
        after = cv2.remap(frames[t + 1], grid + half, None, **options)  # type: ignore[call-overload]
        between = (before.astype(np.float32) + after) / 2
        errors.append(np.abs(between - frames[t]).mean())
    return float(1 - np.mean(errors) / 255)


def steady(flow: NDArray[np.float32], frames: Frames) -> NDArray[np.float32]:
    """Flow [T', H, W, 2] averaged over `STEADY` steps; zero where the picture is flat, since there it is a guess."""
    window = min(STEADY, len(flow))
    mean = np.lib.stride_tricks.sliding_window_view(flow, window, axis=0).mean(-1)
    grey = frames[: len(mean)].astype(np.float32).mean(3)
    return np.where((_steps(grey) / 2 > FLAT)[..., None], mean, 0).astype(np.float32)


def _steps(levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Difference [..., H, W] of the neighbours on both sides, along x or y, whichever is larger."""
    return np.maximum(*(np.abs(np.roll(levels, -1, axis) - np.roll(levels, 1, axis)) for axis in (-2, -1)))


def dynamic(flow: NDArray[np.float32], size: tuple[int, ...], fps: float) -> bool:
    """Whether the largest 5 % of the flow, as between frames of 8 a second, exceed VBench's threshold for this size."""
    length = np.sort(np.linalg.norm(flow, axis=-1).reshape(len(flow), -1), axis=1)
    top = length[:, -max(1, length.shape[1] // 20) :].mean()
    return bool(top * fps / DYNAMIC_FPS > DYNAMIC_PIXELS * min(size) / DYNAMIC_SIDE)


def optical_flow(frames: Frames) -> NDArray[np.float32]:
    """Dense flow [T − 1, H, W, 2] (x, y) in pixels from each frame to the next; small frames are enlarged for it."""
    flow = DenseFlow(frames.shape[1], frames.shape[2])
    return np.stack([flow.between(before, after) for before, after in pairwise(map(flow.grey, frames))])


def sharpness(frames: Frames, masks: Mask) -> float:
    """How steeply colour falls off where objects end: the mean saturation step at their outline over the step inside.

    A rendered, antialiased edge falls within one or two pixels: 1. A blurred one takes more: less. No object: 0.
    """
    saturation = (frames.max(3).astype(np.float32) - frames.min(3)) / 255
    scores = []
    for level, mask in zip(saturation, masks, strict=True):
        if not mask.any():
            scores.append(0.0)
            continue
        inside = float(np.quantile(level[mask], 0.8))
        scores.append(min(1.0, float(_steps(level)[rim(mask)].mean()) / max(inside, 1e-6)))
    return float(np.mean(scores))


def _pooled(frames: Frames, where: Mask, covered: bool = False) -> Features:
    """Mean colour around mid-grey of each of 8×8 fields, over the pixels in `where`: [T, 192].

    `covered`: times the share of the field that they cover, so that one pixel does not count as much as all.
    """
    count, height, width, _ = frames.shape
    shape = (count, POOL, height // POOL, POOL, width // POOL)
    cut = (slice(None), slice(height // POOL * POOL), slice(width // POOL * POOL))
    weights = where[cut].reshape(shape).astype(np.float64)
    colours = (frames[cut].astype(np.float64) - 128).reshape(*shape, 3)
    total = (colours * weights[..., None]).sum((2, 4))
    counted = np.prod(shape[2::2]) if covered else np.maximum(weights.sum((2, 4)), 1)[..., None]
    return (total / counted).reshape(count, -1)


def around_object(frames: Frames, masks: Mask, covered: bool = False) -> Features:
    """The object's pixels, each frame turned so that the object is in the middle; zero where there is none.

    Pooled to 8×8 fields, each as bright as its pixels are, or, `covered`, also as much as they cover of it.
    """
    turned, seen = np.zeros_like(frames), np.zeros_like(masks)
    for t, mask in enumerate(masks):
        if not mask.any():
            continue
        shifts = [round((size + 1) / 2 - centre_of(mask, axis)) for axis, size in enumerate(mask.shape)]
        turned[t], seen[t] = (np.roll(array, shifts, (0, 1)) for array in (frames[t], mask))
    return _pooled(turned, seen, covered)


def bootstrap(
    values: NDArray[np.float64],
    seed: int = 0,
    draws: int = 2000,
    figure: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda means: means,
) -> tuple[float, float]:
    """95 % confidence interval of the mean, by resampling the videos, or of a `figure` of several means.

    `values` [videos], or [videos, k] of k quantities: `figure` then makes [draws] of their means [draws, k].
    """
    random = np.random.default_rng(seed)
    means = random.choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(figure(means), (0.025, 0.975))
    return float(low), float(high)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927): with 64 of 64 it is not known that all others would."""
    z = 1.959964
    middle, wide = share + z**2 / (2 * count), z * ((share * (1 - share) + z**2 / (4 * count)) / count) ** 0.5
    low, high = ((middle + sign * wide) / (1 + z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and 95 % interval of every metric over the videos that have it, and how many those are.

    The interval is Wilson's for what a video shows or does not, else by resampling the videos.
    """
    result: dict[str, Any] = {}
    for name in sorted({name for row in rows for name in row}, key=_order):
        values = np.array([row[name] for row in rows if name in row])
        shown_or_not = set(values) <= {0.0, 1.0}
        low, high = wilson(float(values.mean()), len(values)) if shown_or_not else bootstrap(values)
        result[name] = {"mean": float(values.mean()), "low": low, "high": high, "videos": len(values)}
    return result


def _order(name: str) -> tuple[int, str]:
    return (DIMENSIONS.index(name) if name in DIMENSIONS else len(DIMENSIONS), name)
