"""Joins and drift: what is known of made footage is measured, on rendered and on real frames."""

from __future__ import annotations

import numpy as np
import pytest

from arlon_ray.config import load_config
from arlon_ray.evaluation.joins import drift_figures, join_figures
from arlon_ray.evaluation.scenes import Frames
from data_pipeline.synthetic import render
from data_pipeline.worlds import held_out_scenes


@pytest.fixture(scope="module")
def videos() -> list[Frames]:
    """Scenes of four segments, 85 frames."""
    scenes = held_out_scenes(load_config("tiny"), "measure", 4)
    return [render(next(scenes)) for _ in range(12)]


JOINS = [34, 51, 68]


def mean(values: list[dict[str, float]], name: str) -> float:
    return float(np.mean([each[name] for each in values]))


def test_nothing_shows_in_footage_without_joins(videos: list[Frames]) -> None:
    found = [join_figures(video, JOINS) for video in videos]
    for name in ("join_difference", "join_flow", "seam_difference", "seam_flow"):
        assert mean(found, name) == pytest.approx(1, abs=0.25 if "seam" in name else 0.12), name  # one seam a video
    assert mean(found, "join_colour") < 1.3
    drift = [drift_figures(video, JOINS) for video in videos]
    assert mean(drift, "drift_quality") == pytest.approx(1, abs=0.05)
    assert mean(drift, "drift_subject") > 0.95 and mean(drift, "drift_colour") < 0.01
    assert mean(drift, "drift_look") > 0.97


def test_what_breaks_at_a_join_shows(videos: list[Frames]) -> None:
    brighter = [
        np.where(np.arange(85)[:, None, None, None] >= 51, np.minimum(v, 247) + 8, v).astype(np.uint8) for v in videos
    ]
    found = [join_figures(video, [51]) for video in brighter]
    assert mean(found, "join_colour") > 10 and mean(found, "join_difference") > 2
    assert mean(found, "seam_colour") < 1.3  # the other borders are as they were
    jumped = [np.concatenate([v[:51], np.roll(v[51:], 5, 1)]) for v in videos]
    found = [join_figures(video, [51]) for video in jumped]
    assert mean(found, "join_flow") > 3 and mean(found, "join_difference") > 2 and mean(found, "join_colour") < 2


def test_drift_shows(videos: list[Frames]) -> None:
    def blurred(video: Frames) -> Frames:
        import cv2

        return np.stack([cv2.GaussianBlur(frame, (0, 0), 2) if t >= 68 else frame for t, frame in enumerate(video)])

    drift = [drift_figures(blurred(video), JOINS) for video in videos]
    assert mean(drift, "drift_quality") < 0.8
    faded = [np.concatenate([v[:68], v[68:] // 2]) for v in videos]
    assert mean([drift_figures(video, JOINS) for video in faded], "drift_colour") > 0.1
    # another object in the end
    other = [np.concatenate([v[:68], w[68:]]) for v, w in zip(videos, videos[1:] + videos[:1], strict=True)]
    drift = [drift_figures(video, JOINS) for video in other]
    assert mean(drift, "drift_subject") < 0.9 and mean(drift, "drift_look") < 0.9


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="none is inside of a group"):
        join_figures(np.zeros((5, 8, 8, 3), np.uint8), [2])
