"""Shot boundaries: where the picture cuts to another scene, found by PySceneDetect in frames and their times.

H × W pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scenedetect import SceneDetector

#: Longer side, in pixels, at which frames are compared. Smaller is faster, and deaf to grain.
SIDE = 160
#: Unit of the times that the detectors are given: a nanosecond, so that rounding moves no cut to another frame.
TIME_BASE = Fraction(1, 10**9)
#: Frames a second. PySceneDetect's time codes want one, but use it only to convert to frame numbers: we go by times.
NOMINAL_FPS = Fraction(30)


def shot_spans(
    frames: Iterable[tuple[float, NDArray[np.uint8]]], duration_s: float, detector: str, threshold: float | None
) -> list[tuple[float, float]]:
    """The shots as (start_s, end_s), in order and without gaps from 0 to `duration_s`; one span where nothing is cut.

    `frames` are (seconds from the first frame, RGB uint8 [H,W,3]) of the whole file in order, at any rate; one at a
    time is held. A shot starts at the time of its first frame. `detector`: "content" compares neighbouring frames,
    "adaptive" also with how much they differ around (a moving camera is no cut); it cannot tell for the first and the
    last two frames. `threshold`: null for PySceneDetect's own. Raises ValueError for another detector.
    """
    from scenedetect.common import FrameTimecode, Timecode

    judge = _detector(detector, threshold)
    cuts: list[FrameTimecode] = []
    moment: FrameTimecode | None = None
    size: tuple[int, int] | None = None
    for time_s, frame in frames:
        # all at the first one's size: it may change within a file, and the detectors compare pixel by pixel
        size = size or _reduced(frame)
        moment = FrameTimecode(Timecode(round(time_s / TIME_BASE), TIME_BASE), NOMINAL_FPS)
        cuts += judge.process_frame(moment, _bgr(frame, size))
    if moment is not None:
        cuts += judge.post_process(moment)
    inner = sorted({cut.seconds for cut in cuts if 0 < cut.seconds < duration_s})
    return list(zip([0.0, *inner], [*inner, duration_s], strict=True))


def _detector(name: str, threshold: float | None) -> SceneDetector:
    """A new detector that reports every cut, however close to the one before.

    PySceneDetect's `min_scene_len` merges short shots into a neighbour, which then holds a cut. Kept apart, they are
    too short to give a clip, and no clip runs across a cut.
    """
    # it takes a second or more, which runs that look for no shots need not spend
    from scenedetect import AdaptiveDetector, ContentDetector

    if name == "content":
        return ContentDetector(min_scene_len=0.0, **({} if threshold is None else {"threshold": threshold}))
    if name == "adaptive":
        return AdaptiveDetector(min_scene_len=0.0, **({} if threshold is None else {"adaptive_threshold": threshold}))
    raise ValueError(f"shot detector {name!r}: expected content or adaptive")


def _reduced(frame: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) of a frame with its longer side at most `SIDE` pixels."""
    height, width = frame.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _bgr(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A frame [H,W,3] at `size` (width, height), its channels in OpenCV's order."""
    frame = np.ascontiguousarray(frame)
    if (frame.shape[1], frame.shape[0]) != size:
        frame = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), np.uint8)
