"""Reading a rendered scene off its pixels: colour, shape, number, place and motion of objects on a grey background.

The world is a torus: what leaves on one side comes back on the other. No learned network is involved, so a reading is
exact where the video is: tests hold it to the ground truth of rendered videos.

Legend: T frames, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arlon_ray.evaluation.world import COLOURS, GROWN, SHAPES, SPEEDS, Deed, as_seen, deeds

Frames = NDArray[np.uint8]
Mask = NDArray[np.bool_]

#: Difference of the largest and the smallest channel from which a pixel is coloured; backgrounds stay below 20.
SATURATED = 70
#: Share of a frame that an object covers at least; less is noise.
SMALLEST = 0.008
#: Share of the frames in which a colour must be seen to be an object's.
SEEN = 0.3
#: Frames over which motion is measured: far enough to move by pixels, near enough not to go round the torus.
LAG = 5
#: Mean step in grey from pixel to pixel from which a camera's motion along them can be seen.
TEXTURED = 1.5
SIMPLE_ACTIONS = ("move", "still")


@dataclass(frozen=True)
class Seen:
    """The objects of one colour: their shape, how many, what they do, and where they are (y, x [T]; NaN: nowhere)."""

    colour: str
    shape: str
    count: int
    deed: Deed
    centre: NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """What a video shows. `presence`: share of frames with an object; `pan`: velocity (x, y) of the camera."""

    things: tuple[Seen, ...]
    presence: float
    pan: tuple[float, float]


def read_scene(frames: Frames, actions: Sequence[str] = SIMPLE_ACTIONS) -> Reading:
    """Read uint8 [T, H, W, 3] of a world in which objects do `actions`.

    Raises ValueError for anything but uint8 RGB of at least two frames.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 2:
        raise ValueError(f"expected uint8 [T, H, W, 3] with T of 2 or more, found {frames.dtype} {list(frames.shape)}")
    masks, side = object_masks(frames), min(frames.shape[1:3])
    present = masks.mean((1, 2)) >= SMALLEST
    # where nothing else moves, a camera cannot be told from its objects: only the rich world has one
    pan = camera(frames, masks) if len(actions) > len(SIMPLE_ACTIONS) else (0.0, 0.0)
    possible = deeds(actions)
    things = []
    for colour, mask in colour_masks(frames, masks).items():
        if (mask.mean((1, 2)) >= SMALLEST).mean() < SEEN:
            continue
        deed = read_deed(mask, possible, side, pan)
        things.append(Seen(colour, read_shape(mask), read_count(mask), deed, centres(mask)))
    return Reading(tuple(things), float(present.mean()), pan)


def object_masks(frames: Frames) -> Mask:
    """Coloured pixels [T, H, W]."""
    return frames.max(3).astype(np.int16) - frames.min(3) > SATURATED


def colour_masks(frames: Frames, masks: Mask) -> dict[str, Mask]:
    """The pixels of each of COLOURS whose hue is nearest, [T, H, W]; only colours that occur."""
    pixels = _hues(frames[masks].astype(np.float64))
    palette = _hues(np.array(list(COLOURS.values()), np.float64))
    nearest = np.abs(pixels[:, None] - palette).sum(2).argmin(1) if len(pixels) else np.zeros(0, int)
    found = {}
    for number, colour in enumerate(COLOURS):
        if (chosen := nearest == number).any():
            found[colour] = np.zeros_like(masks)
            found[colour][masks] = chosen
    return found


def _hues(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Channels [N, 3] without brightness and saturation: 0 to 1."""
    return (rgb - rgb.min(1, keepdims=True)) / np.maximum(1.0, np.ptp(rgb, axis=1, keepdims=True))


def read_count(masks: Mask) -> int:
    """How many objects most of the frames show that show any."""
    shown = masks[masks.mean((1, 2)) >= SMALLEST]
    return int(np.bincount([max(1, len(components(mask))) for mask in shown]).argmax())


def components(mask: Mask) -> list[Mask]:
    """Connected parts (8 neighbours, across the torus's seams) of [H, W] that are large enough to be an object."""
    import cv2

    count, wide = cv2.connectedComponents(np.pad(mask, 1, mode="wrap").astype(np.uint8), connectivity=8)
    labels = wide[1:-1, 1:-1]
    same = np.arange(count)
    for outer, inner in np.unique(np.stack([wide, np.pad(labels, 1, mode="wrap")], -1)[wide > 0], axis=0):
        same[same == same[outer]] = same[inner]
    labels = same[labels]
    names, sizes = np.unique(labels[mask], return_counts=True)
    return [labels == name for name, size in zip(names, sizes, strict=True) if size >= SMALLEST * mask.size]


def read_deed(masks: Mask, possible: Sequence[Deed], side: int, pan: tuple[float, float] = (0.0, 0.0)) -> Deed:
    """The deed whose displacements over `LAG` frames are nearest to those seen (mean absolute difference).

    `side` is the shorter side of the frames; `pan` is added, since what stands still moves against the camera.
    """
    lag = min(LAG, len(masks) - 1)
    at, shifts = displacements(masks, lag)
    if not len(at):
        return Deed("still")
    if grown := growth(masks):
        possible = [deed for deed in possible if (deed.action == "grow") == (grown > (1 + GROWN**2) / 2)] or possible
    moved = shifts * (64 / side) + lag * np.array(pan) * (64 / side)

    def distance(deed: Deed) -> float:
        places = deed.offsets(len(masks))
        return float(np.abs(moved - (places[at + lag] - places[at])).mean())

    return as_seen(min(possible, key=distance))


def displacements(masks: Mask, lag: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Frames t, and the shift (x, y) that lays frame t over frame t + lag, where both show something.

    By circular cross-correlation, with a parabola through the peak for fractions of a pixel.
    """
    shown = masks.mean((1, 2)) >= SMALLEST / 2
    at = np.nonzero(shown[:-lag] & shown[lag:])[0]
    spectra = np.fft.rfft2(masks.astype(np.float64))
    correlation = np.fft.irfft2(spectra[at + lag] * spectra[at].conj(), s=masks.shape[1:])
    return at, np.array([_peak(frame)[::-1] for frame in correlation]).reshape(-1, 2)


def motion(masks: Mask) -> tuple[float, float]:
    """Velocity (x, y) in pixels a frame: the median over time."""
    lag = min(LAG, len(masks) - 1)
    _, shifts = displacements(masks, lag)
    x, y = np.median(shifts, axis=0) / lag if len(shifts) else (0.0, 0.0)
    return float(x), float(y)


def _peak(correlation: NDArray[np.float64]) -> tuple[float, float]:
    """Place (y, x) of the largest value, as signed shifts; of equal ones the nearest."""
    near = [np.abs((np.arange(size) + size / 2) % size - size / 2) for size in correlation.shape]
    spread = float(np.ptp(correlation))
    peak = np.unravel_index(
        int((correlation - 1e-4 * spread * (near[0][:, None] + near[1])).argmax()), correlation.shape
    )
    place = []
    for axis, at in enumerate(peak):
        size = correlation.shape[axis]
        line = np.take(correlation, peak[1 - axis], axis=1 - axis)
        left, middle, right = line[at - 1], line[at], line[(at + 1) % size]
        curve = left - 2 * middle + right
        offset = 0.5 * (left - right) / curve if curve < 0 else 0.0
        place.append((at + offset + size / 2) % size - size / 2)
    return place[0], place[1]


def growth(masks: Mask) -> float:
    """How many times larger the area is in the last fifth of the frames than in the first; 0: not to be seen."""
    areas, part = masks.sum((1, 2)).astype(np.float64), max(1, len(masks) // 5)
    first, last = np.median(areas[:part]), np.median(areas[-part:])
    return float(last / first) if first else 0.0


def camera(frames: Frames, masks: Mask) -> tuple[float, float]:
    """Velocity (x, y) in pixels a frame of the camera: against the shift of what is not coloured."""
    lag = min(LAG, len(frames) - 1)
    grey = frames.mean(3)
    around = grown(masks)
    means = np.array([frame[~mask].mean() if not mask.all() else 0.0 for frame, mask in zip(grey, around, strict=True)])
    grey = np.where(around, 0.0, grey - means[:, None, None])
    inside = ~grown(around)
    steps = [np.abs(np.diff(grey, axis=axis, append=grey.take([0], axis))) for axis in (2, 1)]
    if not inside.any():
        return 0.0, 0.0
    seen_x, seen_y = (step[inside].mean() >= TEXTURED for step in steps)
    spectra = np.fft.rfft2(grey)
    correlation = np.fft.irfft2(spectra[lag:] * spectra[:-lag].conj(), s=grey.shape[1:]).mean(0)
    y, x = _peak(correlation)
    x, y = x * seen_x, y * seen_y
    return (-x / lag + 0.0, -y / lag + 0.0) if np.hypot(x, y) / lag > 0.4 * min(SPEEDS.values()) else (0.0, 0.0)


def grown(masks: Mask, by: int = 2) -> Mask:
    """Masks [T, H, W] widened by so many pixels, across the seams."""
    for _ in range(by):
        masks = masks | np.logical_or.reduce([np.roll(masks, step, axis) for axis in (-1, -2) for step in (1, -1)])
    return masks


def rim(mask: Mask) -> Mask:
    """Its outermost pixels."""
    return mask & grown(~mask, 1)


def centres(masks: Mask) -> NDArray[np.float64]:
    """Centre of mass (x, y) on the torus [T, 2]; NaN where nothing is."""
    places = np.full((len(masks), 2), np.nan)
    for t, mask in enumerate(masks):
        if mask.mean() >= SMALLEST / 2:
            places[t] = [centre_of(mask, axis) for axis in (1, 0)]
    return places


def centre_of(mask: Mask, axis: int) -> float:
    """Centre of mass of [H, W] along an axis of the torus, in pixels; the first pixel's own is 0.5."""
    size = mask.shape[axis]
    angles = 2 * np.pi * (np.arange(size) + 0.5) / size
    return float(np.angle((mask.sum(1 - axis) * np.exp(1j * angles)).sum()) * size / (2 * np.pi))


def read_relation(first: Seen, second: Seen, size: tuple[int, int]) -> tuple[float, float]:
    """Where `first` is seen from `second` when both are seen for the first time: (x, y) in pixels, on the torus."""
    gap = first.centre - second.centre
    both = gap[~np.isnan(gap).any(1)]
    if not len(both):
        return 0.0, 0.0
    wide = np.array([size[1], size[0]])
    start = (both[:LAG] + wide / 2) % wide - wide / 2
    x, y = np.median(start, axis=0)
    return float(x), float(y)


def read_shape(masks: Mask) -> str:
    """The shape whose outline, at equal area and centre, overlaps best with the objects (mean over up to 12 frames)."""
    shown = masks[masks.mean((1, 2)) >= SMALLEST]
    chosen = shown[np.linspace(0, len(shown) - 1, min(12, len(shown))).round().astype(int)]
    scores = [_overlaps(part) for mask in chosen for part in (components(mask) or [mask])]
    return SHAPES[int(np.mean(scores, axis=0).argmax())]


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
    return (np.arange(size) + 0.5 - centre_of(part, axis) + size / 2) % size - size / 2


def outline(shape: str, area: float, dx: NDArray[np.float64], dy: NDArray[np.float64]) -> Mask:
    """Pixels of a shape of `area`; `dx` and `dy` from its centre of mass."""
    if shape == "circle":
        return dx * dx + dy * dy <= area / np.pi
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= np.sqrt(area) / 2
    inner = np.sqrt(area / (3 * np.sqrt(3)))  # of an equilateral triangle that points upwards
    return (dy <= inner) & (np.abs(dx) * np.sqrt(3) / 2 - dy / 2 <= inner)
