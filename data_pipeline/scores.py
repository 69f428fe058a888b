"""Row functions: what is measured of a clip's frames, and which thresholds it has to keep.

A score is a column (`schema.SCORES`), of clips that are kept and of clips that are not: a finished dataset can be
filtered again without decoding. T frames of H × W pixels, uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from arlon_ray.config import FilterConfig
from data_pipeline import schema
from data_pipeline.schema import Row

Frames = NDArray[np.uint8]
#: A frame is black if nearly all of its pixels have this luma (of 255) at most: ffmpeg's blackdetect. A mean would call
#: white letters on black black.
BLACK_LUMA, BLACK_PIXELS = 25, 0.98
#: Mean absolute difference (of 255) of the block that changed most, of 8 × 8 blocks, up to which a frame equals the one
#: before: above what H.264 does to a still between its key frames (0.4), below what a small slow object does (1.2). The
#: mean of the whole picture does not tell the two apart.
FROZEN_DIFFERENCE, FROZEN_BLOCKS = 1.0, (8, 8)
#: Longer side, in pixels, at which frames are compared, and how many pairs of them motion is measured on.
COMPARED_SIDE, FLOW_PAIRS = 128, 6
#: Frames of a clip on which sharpness and text are measured, and of which the hash consists.
LOOKED_AT = 3
#: Longer side, in pixels, at which sharpness is measured: of pictures of different sizes it tells the same.
SHARPNESS_SIDE = 512
#: Of written text: least contrast of a stroke (of 255), heights of a line in pixels, and the share of a picture above
#: which strokes are a texture. These and the bounds in `_lines` were fitted to putText over footage of 64 to 720 lines.
STROKE_CONTRAST, LINE_HEIGHTS, MOST_STROKES = 55, (5, 30), 0.3
#: Strokes are thinner than the one, gaps between letters narrower than the other.
_STROKE, _GAP = np.ones((9, 9), np.uint8), np.ones((1, 9), np.uint8)


def measure(frames: Frames, fps: float, text: bool = False) -> Row:
    """All scores of a clip [T,H,W,3]; `text` only if asked for, else None."""
    small = np.stack([_smaller(_grey(frame), COMPARED_SIDE) for frame in frames])
    looked_at = frames[np.linspace(0, len(frames) - 1, LOOKED_AT).round().astype(int)]
    grey = [_grey(frame) for frame in looked_at]
    return {
        "black": black(small),
        "frozen": frozen(small),
        "motion": motion(small, fps),
        "sharpness": float(np.median([sharpness(picture) for picture in grey])),
        "text": float(np.mean([written(frame) for frame in looked_at])) if text else None,
        "phash": b"".join(perceptual_hash(picture) for picture in grey),
    }


def black(grey: Frames) -> float:
    """Share of frames of which `BLACK_PIXELS` have a luma of `BLACK_LUMA` at most; `grey` is [T,H,W]."""
    lit = [np.count_nonzero(picture > BLACK_LUMA) for picture in grey]
    return float(np.mean(np.array(lit) <= (1 - BLACK_PIXELS) * grey[0].size))


def frozen(grey: Frames) -> float:
    """Share of frames, but for the first, that equal the one before up to `FROZEN_DIFFERENCE`; `grey` is [T,H,W]."""
    if len(grey) < 2:
        return 0.0
    differences = (cv2.absdiff(later, earlier).astype(np.float32) for earlier, later in pairwise(grey))
    blocks = [cv2.resize(difference, FROZEN_BLOCKS, interpolation=cv2.INTER_AREA) for difference in differences]
    return float(np.mean([block.max() <= FROZEN_DIFFERENCE for block in blocks]))


def motion(grey: Frames, fps: float) -> float:
    """Mean optical flow in shorter sides of the picture a second (DIS, Kroeger et al. 2016), over some frame pairs."""
    if len(grey) < 2:
        return 0.0
    first = np.unique(np.linspace(0, len(grey) - 2, FLOW_PAIRS).round().astype(int))
    flow = _flow()
    lengths = []
    for index in first:
        earlier, later = _smaller(grey[index], COMPARED_SIDE), _smaller(grey[index + 1], COMPARED_SIDE)
        field = flow.calc(earlier, later, None)  # type: ignore[call-overload]
        # not cv2.magnitude: its last bit depends on where in memory the field lies
        lengths.append(float(np.hypot(field[..., 0], field[..., 1]).mean(dtype=np.float64)) / min(earlier.shape))
    return float(np.mean(lengths)) * fps


def sharpness(grey: Frames) -> float:
    """Variance of the Laplacian of one picture [H,W] (Pech-Pacheco et al. 2000)."""
    return float(cv2.Laplacian(_smaller(grey, SHARPNESS_SIDE), cv2.CV_64F).var())


def perceptual_hash(grey: Frames) -> bytes:
    """64 bits of a picture [H,W]: which of its 8 × 8 lowest frequencies are above their median (pHash, Zauner 2010)."""
    frequencies = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8]
    return np.packbits(frequencies.ravel() > np.median(frequencies.ravel()[1:])).tobytes()


def written(frame: Frames) -> float:
    """Share of a picture [H,W,3] that lines of text cover.

    Letters are thin strokes of high contrast, light or dark: a top-hat finds them, a closing along the rows joins them
    to lines, and `_lines` keeps the lines whose strokes are as many and as unequal as those of letters. Found are
    letters from 6 pixels up (of a picture shrunk to `SHARPNESS_SIDE`) to a tenth of the longer side.
    """
    grey = _grey(frame)
    side = min(SHARPNESS_SIDE, max(SHARPNESS_SIDE // 2, max(grey.shape)))
    whole = _resized(grey, side)
    covered = np.zeros(whole.shape, bool)
    # small letters at the whole size, large ones at half of it
    for scale, picture in ((1, whole), (2, _resized(whole, side // 2))):
        for light_or_dark in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):
            strokes = cv2.morphologyEx(picture, light_or_dark, _STROKE) >= STROKE_CONTRAST
            for left, top, width, height in _lines(strokes.astype(np.uint8)):
                covered[scale * top : scale * (top + height), scale * left : scale * (left + width)] = True
    return float(covered.mean())


def _lines(strokes: Frames) -> NDArray[np.int32]:
    """Boxes [n,4] (left, top, width, height) of what looks like a line of text in a mask of strokes [H,W]."""
    if strokes.mean() > MOST_STROKES:
        return np.zeros((0, 4), np.int32)
    _, piece_of, pieces, _ = cv2.connectedComponentsWithStats(strokes)
    letter = (pieces[:, cv2.CC_STAT_HEIGHT] <= LINE_HEIGHTS[1]) & (pieces[:, cv2.CC_STAT_AREA] >= 5)
    letter[0] = False  # the background
    letters = letter.astype(np.uint8)[piece_of]
    count, line_of, lines, _ = cv2.connectedComponentsWithStats(cv2.morphologyEx(letters, cv2.MORPH_CLOSE, _GAP))
    # a run: the pixels of one row that one stroke covers
    edges = np.diff(np.pad(letters.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    (row, start), end = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    line = line_of[row, start]
    runs, ink = np.bincount(line, minlength=count), np.bincount(line, end - start, count)
    piece, first = np.unique(piece_of[row, start], return_index=True)
    number, unequal = _varied(line[first], pieces[piece, cv2.CC_STAT_AREA].astype(np.float64), count)
    width, height, area = lines[:, 2], lines[:, 3], lines[:, 4]
    found = (
        _between(height, *LINE_HEIGHTS)
        & (width >= 2.5 * height)
        & (area >= 0.42 * width * height)
        & (runs >= 3.4 * height)  # strokes that a row crosses: one is an edge, two are a bar
        & _between(runs / width, 0.45, 2.4)  # the same in a piece as wide as the line is high
        & _between(ink / (width * height), 0.17, 0.68)
        & ((number < 4) | (unequal > 0.25))  # bars and tiles of a pattern are equal
    )
    found[0] = False
    return lines[found, :4].astype(np.int32)


def _varied(
    group: NDArray[Any], value: NDArray[np.float64], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Number, and standard deviation over mean, of the values [n] in each of `count` groups: 2 × [count]."""
    number = np.bincount(group, minlength=count)
    mean = np.bincount(group, value, count) / np.maximum(number, 1)
    variance = np.bincount(group, value**2, count) / np.maximum(number, 1) - mean**2
    return number, np.sqrt(np.maximum(variance, 0)) / np.maximum(mean, 1)


def _between(value: NDArray[Any], low: float, high: float) -> NDArray[np.bool_]:
    return (value >= low) & (value <= high)


@cache
def _flow() -> cv2.DISOpticalFlow:
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    # its own finest scale, 2, is too coarse for 64 pixels: OpenCV would choose another and take eight times as long
    flow.setFinestScale(1)
    return flow


def _grey(frame: Frames) -> Frames:
    """[H,W] of [H,W,3]."""
    return cast(Frames, cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))


def _smaller(grey: Frames, side: int) -> Frames:
    """[H,W] with its longer side `side` pixels at most."""
    return grey if max(grey.shape) <= side else _resized(grey, side)


def _resized(grey: Frames, side: int) -> Frames:
    """[H,W] with its longer side `side` pixels."""
    scale = side / max(grey.shape)
    if scale == 1:
        return grey
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(grey, size, interpolation=how).astype(np.uint8, copy=False)


@dataclass(frozen=True)
class Threshold:
    """A filter: `value` of a row is compared with the setting `name`."""

    name: str
    reason: str
    value: Callable[[Mapping[str, Any]], float | None]
    lowest: bool

    def broken(self, row: Mapping[str, Any], filters: FilterConfig) -> str:
        """What is wrong with a row; empty if nothing is, if the filter is off, or if there is no value."""
        bound, value = getattr(filters, self.name), self.value(row)
        if bound is None or value is None or (value >= bound if self.lowest else value <= bound):
            return ""
        return f"{value:.4g} is {'below' if self.lowest else 'above'} filters.{self.name}={bound:g}"


def _column(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda row: row[name]


#: Filters that look at one row; the first that it breaks is its reason. Near-duplicates: `duplicates.py`.
FILE_THRESHOLDS = (
    Threshold("min_duration_s", schema.SHORT_FILE, _column("source_duration_s"), True),
    Threshold(
        "min_short_side", schema.LOW_RESOLUTION, lambda row: min(row["source_height"], row["source_width"]), True
    ),
)
CLIP_THRESHOLDS = (
    Threshold("max_black", schema.BLACK, _column("black"), False),
    Threshold("max_frozen", schema.FROZEN, _column("frozen"), False),
    Threshold("min_motion", schema.LITTLE_MOTION, _column("motion"), True),
    Threshold("max_motion", schema.MUCH_MOTION, _column("motion"), False),
    Threshold("min_sharpness", schema.BLURRED, _column("sharpness"), True),
    Threshold("max_text", schema.TEXT_HEAVY, _column("text"), False),
)


def judge(row: Mapping[str, Any], filters: FilterConfig, thresholds: Iterable[Threshold]) -> tuple[str, str]:
    """(reason, what is wrong) of the first threshold that a row breaks; two empty texts if it keeps them all."""
    for threshold in thresholds:
        if error := threshold.broken(row, filters):
            return threshold.reason, error
    return "", ""
