"""Whether an object that goes away comes back as it was: what a model remembers beyond what it looks back on.

The scenes are those of the returning grade (`data_pipeline/worlds.py`): an object is there for one group of frames,
goes away, is gone for three groups, and comes back. Where the caption does not say what it is, nothing but the first
group does. Legend: T frames.
"""

from __future__ import annotations

import numpy as np

from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.scenes import Frames, Seen, object_masks, read_scene
from arlon_ray.evaluation.world import RETURNING

#: Groups of a video in which what went away is back for one whole group.
GROUPS = sum(RETURNING) + 1
#: How far from its place what comes back may be, as a share of the shorter side.
NEAR = 0.15
#: Share of a frame that is coloured from which something is seen.
SEEN_AT_ALL = 0.004


def return_figures(frames: Frames) -> dict[str, float]:
    """Readings of uint8 [T, H, W, 3] of at least `GROUPS` groups of 17 frames.

    `gone`: share of the frames of the middle group of absence that show nothing. Of the first group after the return,
    1 or 0: `came_back` (something is there), `same_colour`, `same_shape`, `same_place`; only where the first group
    shows something. Raises ValueError if the video is too short.
    """
    if len(frames) < GROUPS * GROUP_FRAMES:
        raise ValueError(f"{len(frames)} frames: expected {GROUPS * GROUP_FRAMES} and more")
    first = _largest(_group(frames, 0))
    middle = _group(frames, RETURNING[0] + RETURNING[1] + RETURNING[2] // 2)
    figures = {"gone": float((object_masks(middle).mean((1, 2)) < SEEN_AT_ALL).mean())}
    if first is None:
        return figures
    back = _largest(_group(frames, sum(RETURNING)))
    return figures | {
        "came_back": float(back is not None),
        "same_colour": float(back is not None and back.colour == first.colour),
        "same_shape": float(back is not None and back.shape == first.shape),
        "same_place": float(back is not None and _apart(first, back, frames.shape[1:3]) < NEAR),
    }


def _group(frames: Frames, number: int) -> Frames:
    return frames[number * GROUP_FRAMES : (number + 1) * GROUP_FRAMES]


def _largest(frames: Frames) -> Seen | None:
    """The object seen in most of the frames."""
    things = read_scene(frames).things
    return max(things, key=lambda seen: np.isfinite(seen.centre[:, 0]).sum(), default=None)


def _apart(one: Seen, other: Seen, size: tuple[int, ...]) -> float:
    """Distance of two objects' places on the torus, as a share of the shorter side."""
    wide = np.array([size[1], size[0]], np.float64)
    turns = [np.nanmean(np.exp(2j * np.pi * seen.centre / wide), axis=0) for seen in (one, other)]
    gap = wide / (2 * np.pi) * np.angle(turns[1] / turns[0])
    return float(np.hypot(*gap) / min(size))
