"""Metrics are high on ground truth and fall with exactly the fault that they are named after."""

from __future__ import annotations

import numpy as np
import pytest

from arlon_ray.evaluation.metrics import bootstrap, measure, summary
from data_pipeline.synthetic import Scene, render, sample_scene

FPS = 16.0


def scene_that(**wanted: object) -> Scene:
    """The first scene with these properties."""
    scenes = (sample_scene(seed, (2,)) for seed in range(10_000))
    return next(scene for scene in scenes if all(getattr(scene, name) == value for name, value in wanted.items()))


@pytest.fixture(scope="module")
def moving() -> tuple[Scene, np.ndarray]:
    scene = scene_that(direction="right", speed="fast", count=1, background="dark")
    return scene, render(scene)


def test_ground_truth_is_near_one() -> None:
    rows = [measure(render(scene), scene, FPS) for scene in (sample_scene(700 + i, (2,)) for i in range(12))]
    means = {name: value["mean"] for name, value in summary(rows).items()}
    assert means["object_class"] == means["colour"] == means["multiple_objects"] == means["action"] == 1.0
    assert all(means[name] > 0.95 for name in ("background_consistency", "temporal_flickering", "motion_smoothness"))
    assert means["subject_consistency"] > 0.9 and means["imaging_quality"] > 0.8


def changed(values: dict[str, float], other: dict[str, float]) -> set[str]:
    return {name for name in values if values[name] - other[name] > 0.03}


def test_each_fault_lowers_its_own_metric(moving: tuple[Scene, np.ndarray]) -> None:
    scene, frames = moving
    good = measure(frames, scene, FPS)
    noise = np.random.default_rng(0).normal(0, 12, frames.shape[:1] + (1, 1, 1))
    flickering = np.clip(frames + noise, 0, 255).astype(np.uint8)
    assert "temporal_flickering" in changed(good, measure(flickering, scene, FPS))
    swapped = frames.copy()
    swapped[17:] = frames[17:][..., ::-1]  # red becomes blue
    assert "subject_consistency" in changed(good, measure(swapped, scene, FPS))
    blurred = frames.astype(np.float32)
    for _ in range(12):
        blurred = sum(np.roll(blurred, step, axis) for axis in (1, 2) for step in (1, -1)) / 4
    assert "imaging_quality" in changed(good, measure(blurred.astype(np.uint8), scene, FPS))
    jumping = frames[np.arange(len(frames)) // 4 * 4]
    assert measure(jumping, scene, FPS)["motion_smoothness"] < good["motion_smoothness"]
    half = frames.copy()
    half[17:] = np.roll(255 - half[17:].max(3, keepdims=True), 0)
    lost = changed(good, measure(half, scene, FPS))
    assert {"presence", "background_consistency", "subject_consistency"} <= lost
    assert measure(frames[::-1].copy(), scene, FPS)["action"] == 0.0


def test_degree_of_motion() -> None:
    fast, still = scene_that(direction="up", speed="fast", count=1), scene_that(direction="still", count=1)
    assert measure(render(fast), None, FPS)["dynamic_degree"] == 1.0
    assert measure(render(still), None, FPS)["dynamic_degree"] == 0.0


def test_the_interval_covers_the_mean_and_narrows() -> None:
    few, many = np.array([0.0, 1.0] * 8), np.array([0.0, 1.0] * 200)
    (a, b), (c, d) = bootstrap(few), bootstrap(many)
    assert a < 0.5 < b and c < 0.5 < d and d - c < (b - a) / 3
