"""Metrics are high on ground truth and fall with exactly the fault that they are named after."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from arlon_ray.evaluation.frechet import frechet_distance, video_features
from arlon_ray.evaluation.metrics import DIMENSIONS, bootstrap, meaning, measure, summary, wilson
from arlon_ray.evaluation.world import RELATIONS, Shot
from data_pipeline.synthetic import render_shot, sample_scene

FPS = 16.0


def shot_that(**wanted: object) -> Shot:
    """The first shot with one object that has these properties."""
    shots = (sample_scene(seed, (2,)).shots[0] for seed in range(10_000))
    for shot in shots:
        facts = {**vars(shot), **vars(shot.things[0])}
        if len(shot.things) == 1 and all(facts[name] == value for name, value in wanted.items()):
            return shot
    raise AssertionError(wanted)


def rendered(shot: Shot) -> np.ndarray:
    return render_shot(shot, 64, 64)


@pytest.fixture(scope="module")
def moving() -> tuple[Shot, np.ndarray]:
    shot = shot_that(direction="right", speed="fast", background="dark")
    return shot, rendered(shot)


@pytest.mark.parametrize("grade", ["simple", "rich"])
def test_ground_truth_is_near_one(grade: str) -> None:
    shots = [sample_scene(700 + i, (2,), grade=grade).shots[0] for i in range(20)]
    rows = [measure(rendered(shot), shot, FPS) for shot in shots if shot.frames == 34]
    means = {name: value["mean"] for name, value in summary(rows).items()}
    assert list(means)[:11] == list(DIMENSIONS)
    assert all(means[name] == 1.0 for name in DIMENSIONS[:4])
    assert means["action"] >= (1.0 if grade == "simple" else 0.9)
    assert means["motion_smoothness"] > 0.98 and means["imaging_quality"] > 0.75
    if grade == "simple":  # a camera that pans moves the background, and objects of their own motion are no one subject
        assert min(means[name] for name in ("background_consistency", "temporal_flickering")) > 0.95
        assert means["subject_consistency"] > 0.9


def test_a_relation_is_measured_only_where_there_is_one() -> None:
    shots = [sample_scene(seed, (2,)).shots[0] for seed in range(40)]
    pair = next(shot for shot in shots if shot.relation == "left of")
    turned = dataclasses.replace(pair, things=pair.things[::-1])
    assert meaning(rendered(pair), pair)["spatial_relationship"] == 1.0
    assert meaning(rendered(pair), turned)["spatial_relationship"] == 0.0
    alone = next(shot for shot in shots if shot.relation is None)
    assert "spatial_relationship" not in meaning(rendered(alone), alone)
    found = summary([meaning(rendered(shot), shot) for shot in (pair, alone)])
    assert found["spatial_relationship"]["videos"] == 1 and found["colour"]["videos"] == 2


def test_captions_of_others_are_met_by_chance_alone() -> None:
    """A video held against another one's caption has what the two captions have in common, and no more."""
    shots = [sample_scene(800 + i, (2,)).shots[0] for i in range(60)]
    frames = [rendered(shot) for shot in shots]
    at = [(i, (i + shift) % len(shots)) for shift in (1, 17) for i in range(len(shots))]
    other = [(shots[i], shots[j]) for i, j in at]
    figures = [meaning(frames[i], shots[j]) for i, j in at]

    def kinds(shot: Shot) -> list[tuple[str, str]]:
        return sorted((thing.colour, thing.shape) for thing in shot.things)

    chance = {
        "object_class": [{k for _, k in kinds(told)} <= {k for _, k in kinds(shown)} for shown, told in other],
        "colour": [{c for c, _ in kinds(told)} <= {c for c, _ in kinds(shown)} for shown, told in other],
        "multiple_objects": [kinds(told) == kinds(shown) for shown, told in other],
    }
    for name, expected in chance.items():
        assert np.mean([row[name] == common for row, common in zip(figures, expected, strict=True)]) >= 0.98, name
    means = {name: value["mean"] for name, value in summary(figures).items()}
    assert means["object_class"] < 0.5 and means["colour"] < 0.3 and means["multiple_objects"] < 0.1
    assert means["action"] < 0.1 and means["spatial_relationship"] < 0.05
    # the same two objects, told to stand as those of others do: of two relations one is right
    pairs = [i for i, shot in enumerate(shots) if shot.relation]
    met = [
        meaning(frames[i], dataclasses.replace(shots[i], relation=shots[j].relation))["spatial_relationship"]
        for shift in (1, 2, 5, 7)
        for i, j in zip(pairs, np.roll(pairs, shift), strict=True)
    ]
    assert len(pairs) >= 15 and np.mean(met) == pytest.approx(1 / len(RELATIONS), abs=0.1)


def test_a_wrong_partner_and_a_missing_one_are_noticed() -> None:
    pair = next(s for s in (sample_scene(seed, (2,)).shots[0] for seed in range(40)) if s.relation)
    first, second = pair.things
    alone, copied = (
        dataclasses.replace(pair, things=things)
        for things in ((first,), (first, dataclasses.replace(second, colour=first.colour)))
    )
    for shown in (alone, copied):
        found = meaning(rendered(shown), pair)
        assert found["multiple_objects"] == found["colour"] == found["action"] == found["spatial_relationship"] == 0.0


def test_frechet_distance_grows_with_the_fault() -> None:
    shots = [sample_scene(seed, (2,)).shots[0] for seed in range(24)]
    videos = [rendered(shot) for shot in shots]
    features = [
        [video_features(video) for video in part] for part in (videos[:12], videos[12:], [v // 2 for v in videos[12:]])
    ]
    same, other, dark = (frechet_distance(features[0], part) for part in features)
    assert same == pytest.approx(0.0, abs=1e-9) and 0 < other < dark / 2
    with pytest.raises(ValueError, match="needs 2 or more"):
        frechet_distance(features[0][:1], features[1])


def changed(values: dict[str, float], other: dict[str, float]) -> set[str]:
    return {name for name in values if values[name] - other[name] > 0.03}


def test_each_fault_lowers_its_own_metric(moving: tuple[Shot, np.ndarray]) -> None:
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
    fast, still = shot_that(direction="up", speed="fast"), shot_that(direction="still")
    assert measure(rendered(fast), None, FPS)["dynamic_degree"] == 1.0
    assert measure(rendered(still), None, FPS)["dynamic_degree"] == 0.0


def test_trembling_is_no_motion() -> None:
    frames = rendered(shot_that(direction="still", background="dark")).copy()
    frames[1::2] = np.roll(frames[1::2], 1, axis=2)  # to and fro by a pixel: twice the threshold
    assert measure(frames, None, FPS)["dynamic_degree"] == 0.0
    walking = np.stack([np.roll(frame, t, axis=1) for t, frame in enumerate(frames)])
    assert measure(walking, None, FPS)["dynamic_degree"] == 1.0


def test_objects_persist_where_nothing_changes_at_a_join(moving: tuple[Shot, np.ndarray]) -> None:
    shot, frames = moving
    frames = np.concatenate([frames, frames])
    assert measure(frames, shot, FPS, joins=[34, 51])["persistence"] == 1.0
    other = frames.copy()
    other[34:] = other[34:][..., ::-1]  # red becomes blue
    assert measure(other, shot, FPS, joins=[34, 51])["persistence"] == 0.5
    gone = frames.copy()
    gone[51:] = 44
    assert measure(gone, shot, FPS, joins=[34, 51])["persistence"] == 0.5
    assert "persistence" not in measure(frames, shot, FPS)


def test_a_share_of_all_or_none_has_an_interval_too() -> None:
    """Values of Wilson's formula; a bootstrap of 64 ones would say that there is no doubt."""
    assert wilson(1.0, 64) == pytest.approx((0.9434, 1.0), abs=1e-4)
    assert wilson(0.0, 64) == pytest.approx((0.0, 0.0566), abs=1e-4)
    assert wilson(59 / 64, 64) == pytest.approx((0.8298, 0.9661), abs=1e-4)
    shown = summary([{"colour": 1.0, "smooth": 0.9}, {"colour": 1.0, "smooth": 0.9}])
    assert shown["colour"]["low"] < 0.4 and shown["smooth"]["low"] == shown["smooth"]["high"] == pytest.approx(0.9)


def test_the_interval_covers_the_mean_and_narrows() -> None:
    few, many = np.array([0.0, 1.0] * 8), np.array([0.0, 1.0] * 200)
    (a, b), (c, d) = bootstrap(few), bootstrap(many)
    assert a < 0.5 < b and c < 0.5 < d and d - c < (b - a) / 3
