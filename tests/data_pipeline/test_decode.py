"""Decoding gives exactly the frames of the span, at the rate and size asked for, with either reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arlon_ray.config import DataConfig, VideoConfig
from data_pipeline import footage
from data_pipeline.clips import find_clips
from data_pipeline.decode import decode_clip, decode_row, fit
from data_pipeline.schema import Row
from data_pipeline.sources import find_sources
from tests.data_pipeline.inputs import numbered, numbers_of, write_video


def clips_of(folder: Path, fps: float, groups: tuple[int, ...] = (2,)) -> list[Row]:
    """Clip rows of the only video in `folder`."""
    next(folder.glob("*.mp4")).with_suffix(".txt").write_text("a ramp")
    video = VideoConfig(height=32, width=32, fps=fps)
    return find_clips(find_sources(folder)[0], video, DataConfig(bucket_groups=groups))[0]


@pytest.mark.parametrize("reader", ["decord", "av"])
def test_spans_hold_their_own_frames(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "av":
        monkeypatch.setattr(footage, "_decord", lambda: None)
    # B-frames and a long GOP: decoding order is not the order on screen, and the second span starts within a GOP
    write_video(tmp_path / "a.mp4", numbered(80), bf="3", g="60")
    first, second = clips_of(tmp_path, 16)
    assert numbers_of(decode_clip(first)) == list(range(34))
    assert numbers_of(decode_clip(second)) == list(range(34, 68))


def test_frames_are_picked_by_time_when_the_rate_differs(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(80), fps=32)
    (half,) = clips_of(tmp_path, 16)
    assert numbers_of(decode_clip(half)) == list(range(1, 69, 2))
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "b" / "a.mp4", numbered(20), fps=8)
    (double,) = clips_of(tmp_path / "b", 16)
    assert numbers_of(decode_clip(double)) == [number // 2 for number in range(34)]


def test_fit_keeps_the_aspect_and_the_centre() -> None:
    frames = np.zeros((1, 40, 120, 3), np.uint8)
    frames[:, :, 40:80] = 255
    frames[:, :20, 40:80, 0] = 0
    cut = fit(frames, 20, 20)
    assert cut.shape == (1, 20, 20, 3)
    # the middle third of the width is what is left, and its upper half has no red
    assert cut[0, :, :, 1].min() > 200
    assert cut[0, :8, :, 0].max() < 60 and cut[0, 12:, :, 0].min() > 200
    same = fit(frames, 40, 120)
    assert same is frames


def test_fit_shows_pixels_that_are_not_square_at_their_true_width() -> None:
    frames = np.zeros((1, 20, 20, 3), np.uint8)
    frames[:, :, 5:15] = 255
    # shown 40 wide: a square from the middle has nothing but the middle half
    assert fit(frames, 20, 20, shown=(20, 40))[..., 1:-1, :].min() > 200


def test_a_file_that_vanishes_is_a_rejected_row(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(34))
    (row,) = clips_of(tmp_path, 16)
    (tmp_path / "a.mp4").unlink()
    result = decode_row(row)
    assert result["reason"] == "decoding failed" and "a.mp4" in result["error"] and result["frames"] == b""


def test_the_stand_in_for_decord_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", numbered(34))
    monkeypatch.setattr(footage, "_notices", {})
    footage.open_footage(str(tmp_path / "a.mp4"))
    assert footage.fallback_notice() == ""

    def broken(path: str, threads: int, pixel_aspect: float) -> footage.DecordFootage:
        raise RuntimeError("no")

    monkeypatch.setattr(footage, "DecordFootage", broken)
    assert isinstance(footage.open_footage(str(tmp_path / "a.mp4")), footage.AvFootage)
    assert "PyAV" in footage.fallback_notice()
