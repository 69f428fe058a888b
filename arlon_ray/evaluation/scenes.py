"""Reading a rendered scene off its pixels: colour, shape, number and motion of the objects on a grey background.

The world is a torus: what leaves on one side comes back on the other. No learned network is involved, so a reading is
exact where the video is: tests hold it to the ground truth of rendered videos.

Legend: T frames, H × W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arlon_ray.evaluation.world import COLOURS, DIRECTIONS, SHAPES, SPEEDS

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]

#: Difference of the largest and the smallest channel from which a pixel is coloured; backgrounds stay below 20.
SATURATED = 70
#: Share of a frame that an object covers at least; less is noise.
SMALLEST = 0.008
#: Frames over which motion is measured: far enough to move by pixels, near enough not to go round the torus.
LAG = 5
#: Slower than this share of the slowest speed is still.
STILL = 0.4


@dataclass(frozen=True)
class Reading:
    """What a video shows. `presence`: share of frames with an object; `velocity` (x, y) in pixels a frame."""

    colour: str | None
    shape: str | None
    count: int
    direction: str | None
    speed: str | None
    velocity: tuple[float, float]
    presence: float


def read_scene(frames: Frames) -> Reading:
    """Read uint8 [T, H, W, 3]. A video that never shows an object has no colour, shape or motion.

    Raises ValueError for anything but uint8 RGB of at least two frames.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 2:
        raise ValueError(f"expected uint8 [T, H, W, 3] with T of 2 or more, found {frames.dtype} {list(frames.shape)}")
    masks = object_masks(frames)
    present = masks.mean((1, 2)) >= SMALLEST
    if not present.any():
        return Reading(None, None, 0, None, None, (0.0, 0.0), 0.0)
    velocity = motion(masks)
    direction, speed = name_motion(velocity, min(frames.shape[1:3]))
    counts = [len(components(mask)) for mask in masks[present]]
    count = int(np.bincount(counts).argmax())
    return Reading(
        colour=read_colour(frames[present], masks[present]),
        shape=read_shape(masks[present]),
        count=count,
        direction=direction,
        speed=speed,
        velocity=velocity,
        presence=float(present.mean()),
    )


def object_masks(frames: Frames) -> Mask:
    """Coloured pixels [T, H, W]."""
    return frames.max(3).astype(np.int16) - frames.min(3) > SATURATED


def read_colour(frames: Frames, masks: Mask) -> str:
    """The palette's colour whose hue is nearest to that of the coloured pixels (their median)."""
    seen = np.median(frames[masks].astype(np.float64), axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(_hue(seen) - _hue(np.array(COLOURS[name], float))).sum()))


def _hue(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Channels without brightness and saturation: 0 to 1."""
    return (rgb - rgb.min()) / max(1.0, float(np.ptp(rgb)))


def components(mask: Mask) -> list[Mask]:
    """Connected parts (4 neighbours, across the torus's seams) of [H, W] that are large enough to be an object."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        spread = labels
        for axis in (0, 1):
            for step in (1, -1):
                spread = np.maximum(spread, np.roll(spread, step, axis))
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, size in zip(names, sizes, strict=True) if size >= SMALLEST * mask.size]


def motion(masks: Mask) -> tuple[float, float]:
    """Velocity (x, y) in pixels a frame: the median over time of the shift that lays frame t over frame t + lag.

    By circular cross-correlation, with a parabola through the peak for fractions of a pixel.
    """
    lag = min(LAG, len(masks) - 1)
    before, after = (np.fft.rfft2(part.astype(np.float64)) for part in (masks[:-lag], masks[lag:]))
    correlation = np.fft.irfft2(after * before.conj(), s=masks.shape[1:])
    shifts = np.array([_peak(frame) for frame in correlation if frame.max() > 0])
    if not len(shifts):
        return 0.0, 0.0
    y, x = np.median(shifts, axis=0) / lag
    return float(x), float(y)


def _peak(correlation: NDArray[np.float64]) -> tuple[float, float]:
    """Place (y, x) of the largest value, as signed shifts."""
    peak = np.unravel_index(int(correlation.argmax()), correlation.shape)
    place = []
    for axis, at in enumerate(peak):
        size = correlation.shape[axis]
        line = np.take(correlation, peak[1 - axis], axis=1 - axis)
        left, middle, right = line[at - 1], line[at], line[(at + 1) % size]
        curve = left - 2 * middle + right
        offset = 0.5 * (left - right) / curve if curve < 0 else 0.0
        place.append((at + offset + size / 2) % size - size / 2)
    return place[0], place[1]


def name_motion(velocity: tuple[float, float], side: int) -> tuple[str, str | None]:
    """Direction and nearest speed (None for what is still) of a velocity, in frames whose shorter side is `side`."""
    x, y = velocity
    pixels = float(np.hypot(x, y)) / (side / 64)
    if pixels < STILL * min(SPEEDS.values()):
        return "still", None
    direction = max(
        (name for name in DIRECTIONS if name != "still"),
        key=lambda name: x * DIRECTIONS[name][0] + y * DIRECTIONS[name][1],
    )
    return direction, min(SPEEDS, key=lambda name: abs(SPEEDS[name] - pixels))


def read_shape(masks: Mask) -> str | None:
    """The shape whose outline, at equal area and centre, overlaps best with the objects (mean over up to 12 frames)."""
    chosen = masks[np.linspace(0, len(masks) - 1, min(12, len(masks))).round().astype(int)]
    scores = [_overlaps(part) for mask in chosen for part in components(mask)]
    return SHAPES[int(np.mean(scores, axis=0).argmax())] if scores else None


def _overlaps(part: Mask) -> list[float]:
    """Intersection over union of one object with each of SHAPES."""
    dy, dx = (_from_centre(part, axis) for axis in (0, 1))
    scores = []
    for shape in SHAPES:
        ideal = outline(shape, float(part.sum()), dx[None, :], dy[:, None])
        scores.append(float((ideal & part).sum() / (ideal | part).sum()))
    return scores


def _from_centre(part: Mask, axis: int) -> NDArray[np.float64]:
    """Signed distance of each row (axis 0) or column from the object's centre of mass, on the torus."""
    size = part.shape[axis]
    weights = part.sum(1 - axis)
    angles = 2 * np.pi * (np.arange(size) + 0.5) / size
    centre = np.angle((weights * np.exp(1j * angles)).sum()) * size / (2 * np.pi)
    return (np.arange(size) + 0.5 - centre + size / 2) % size - size / 2


def outline(shape: str, area: float, dx: NDArray[np.float64], dy: NDArray[np.float64]) -> Mask:
    """Pixels of a shape of `area`; `dx` and `dy` from its centre of mass."""
    if shape == "circle":
        return dx * dx + dy * dy <= area / np.pi
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= np.sqrt(area) / 2
    inner = np.sqrt(area / (3 * np.sqrt(3)))  # of an equilateral triangle that points upwards
    return (dy <= inner) & (np.abs(dx) * np.sqrt(3) / 2 - dy / 2 <= inner)
