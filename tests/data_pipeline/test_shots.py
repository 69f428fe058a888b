"""Shots: rendered scenes with motion, cut hard; the detectors must find the cuts and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.shots import SIDE, shot_spans

Frames = NDArray[np.uint8]
DETECTORS = ["content", "adaptive"]


def scene(seed: int, count: int, height: int = 72, width: int = 128, speed: int = 2) -> Frames:
    """A textured scene [T,H,W,3] past which the camera moves `speed` pixels a frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 12, (width + speed * count) // 12 + 1, 3), dtype=np.uint8)
    colour = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])[seed % 3]
    wide = cv2.resize(coarse // 4 + (colour * 3 // 4).astype(np.uint8), (width + speed * count, height))
    return np.stack([wide[:, speed * frame : speed * frame + width] for frame in range(count)])


def timed(frames: Frames, fps: float) -> Iterator[tuple[float, Frames]]:
    return ((number / fps, frame) for number, frame in enumerate(frames))


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("fps", [10.0, 24000 / 1001, 60.0])
def test_a_hard_cut_is_found_at_the_first_frame_of_the_new_scene(detector: str, fps: float) -> None:
    frames = np.concatenate([scene(0, 30), scene(1, 20)])
    spans = shot_spans(timed(frames, fps), 50 / fps, detector, None)
    assert spans == [(0.0, pytest.approx(30 / fps, abs=1e-8)), (spans[0][1], 50 / fps)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_three_scenes_are_three_shots_however_short(detector: str) -> None:
    # 8 frames are fewer than PySceneDetect's min_scene_len, which would leave a cut within a shot
    frames = np.concatenate([scene(0, 12), scene(1, 8), scene(2, 25)])
    spans = shot_spans(timed(frames, 25.0), 45 / 25, detector, None)
    assert [start for start, _ in spans] == pytest.approx([0.0, 12 / 25, 20 / 25], abs=1e-8)
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]] and spans[-1][1] == 45 / 25


@pytest.mark.parametrize("detector", DETECTORS)
def test_motion_alone_is_one_shot(detector: str) -> None:
    assert shot_spans(timed(scene(1, 40), 20.0), 2.0, detector, None) == [(0.0, 2.0)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_times_count_not_frame_numbers(detector: str) -> None:
    gaps = np.random.default_rng(0).choice([0.01, 0.04, 0.3], 45)
    times = np.cumsum(gaps) - gaps[0]
    frames = np.concatenate([scene(0, 20), scene(1, 25)])
    duration_s = float(times[-1]) + 0.04
    spans = shot_spans(zip(times.tolist(), frames, strict=True), duration_s, detector, None)
    assert spans == [(0.0, pytest.approx(times[20], abs=1e-8)), (spans[0][1], duration_s)]


def test_the_threshold_is_the_detector_s() -> None:
    frames = np.concatenate([scene(0, 20), scene(1, 20)])
    for detector, high in (("content", 200.0), ("adaptive", 250.0)):
        assert len(shot_spans(timed(frames, 20.0), 2.0, detector, high)) == 1
    # as low as this, the motion counts as well
    assert len(shot_spans(timed(frames, 20.0), 2.0, "content", 0.5)) > 10


def test_adaptive_takes_a_fast_camera_for_no_cut() -> None:
    rng = np.random.default_rng(0)
    # each frame as far from the one before as the next: a pan too fast to follow
    fast = rng.integers(0, 255, (40, 9, 16, 3), dtype=np.uint8)
    assert len(shot_spans(timed(fast, 20.0), 2.0, "content", None)) > 30
    assert shot_spans(timed(fast, 20.0), 2.0, "adaptive", None) == [(0.0, 2.0)]
    # its threshold is that ratio
    assert len(shot_spans(timed(fast, 20.0), 2.0, "adaptive", 0.5)) > 30


@pytest.mark.parametrize("detector", DETECTORS)
def test_files_of_one_frame_and_of_none_are_one_shot(detector: str) -> None:
    assert shot_spans(timed(scene(0, 1), 25.0), 0.04, detector, None) == [(0.0, 0.04)]
    assert shot_spans(iter(()), 1.0, detector, None) == [(0.0, 1.0)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_frames_beyond_the_duration_make_no_shot(detector: str) -> None:
    frames = np.concatenate([scene(0, 20), scene(1, 20)])
    assert shot_spans(timed(frames, 20.0), 1.0, detector, None) == [(0.0, 1.0)]


@pytest.mark.parametrize("detector", DETECTORS)
def test_frames_are_looked_at_one_by_one_and_small(detector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from scenedetect import ContentDetector

    seen: list[tuple[int, ...]] = []
    original = ContentDetector.process_frame

    def spy(self: ContentDetector, timecode: object, frame_img: Frames) -> object:
        seen.append(frame_img.shape)
        assert len(seen) == drawn
        return original(self, timecode, frame_img)  # type: ignore[arg-type]

    monkeypatch.setattr(ContentDetector, "process_frame", spy)
    drawn = 0

    def frames() -> Iterator[tuple[float, Frames]]:
        nonlocal drawn
        # the file changes its size on the way; the last frames are taller than wide
        parts = (scene(0, 8, 360, 640), scene(0, 8, 180, 320), scene(1, 8, 640, 360))
        for frame in (frame for part in parts for frame in part):
            drawn += 1
            yield (drawn - 1) / 16, frame

    spans = shot_spans(frames(), 1.5, detector, None)
    assert seen == [(90, SIDE, 3)] * 24
    assert 1.0 in [start for start, _ in spans]


def test_colours_reach_the_detector_as_it_expects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from scenedetect import ContentDetector

    seen: list[list[int]] = []
    monkeypatch.setattr(
        ContentDetector, "process_frame", lambda self, timecode, frame_img: seen.append(frame_img[0, 0].tolist()) or []
    )
    shot_spans([(0.0, np.full((4, 4, 3), (200, 100, 50), np.uint8))], 1.0, "content", None)
    assert seen == [[50, 100, 200]]


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for detector in DETECTORS:
            shot_spans(timed(np.concatenate([scene(0, 10), scene(1, 10)]), 10.0), 2.0, detector, None)
    assert tuple(capfd.readouterr()) == ("", "") and not caplog.records


def test_another_detector_is_refused() -> None:
    with pytest.raises(ValueError, match="'hash': expected content or adaptive"):
        shot_spans(iter(()), 1.0, "hash", None)
