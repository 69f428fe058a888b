"""Readings are right on ground truth, and at chance on other scenes' truth."""

from __future__ import annotations

import numpy as np
import pytest

from arlon_ray.evaluation.scenes import Reading, components, motion, name_motion, read_scene
from data_pipeline.synthetic import Scene, render, sample_scene

COUNT = 120


@pytest.fixture(scope="module")
def read() -> list[tuple[Scene, Reading]]:
    scenes = [sample_scene(900_000 + i, (2,)) for i in range(COUNT)]
    return [(scene, read_scene(render(scene))) for scene in scenes]


def share(pairs: list[tuple[Scene, Reading]], field: str) -> float:
    """How often a reading names the truth; the speed of what stands still is nobody's."""
    counted = [(s, r) for s, r in pairs if field != "speed" or s.direction != "still"]
    return sum(getattr(s, field) == getattr(r, field) for s, r in counted) / len(counted)


@pytest.mark.parametrize("field", ["colour", "shape", "count", "direction", "speed"])
def test_ground_truth_is_read(read: list[tuple[Scene, Reading]], field: str) -> None:
    assert share(read, field) >= 0.98


@pytest.mark.parametrize("field, chance", [("colour", 1 / 6), ("shape", 1 / 3), ("direction", 1 / 5), ("speed", 0.27)])
def test_other_scenes_truth_is_met_by_chance_alone(
    read: list[tuple[Scene, Reading]], field: str, chance: float
) -> None:
    shuffled = [(read[i][0], read[(i + shift) % COUNT][1]) for shift in (7, 31, 59) for i in range(COUNT)]
    assert share(shuffled, field) == pytest.approx(chance, abs=0.07)


def test_presence_and_nothing() -> None:
    scene = sample_scene(1, (2,))
    frames = render(scene)
    half = frames.copy()
    half[17:] = 100
    assert read_scene(frames).presence == 1.0 and read_scene(half).presence == 0.5
    nothing = read_scene(np.full((4, 64, 64, 3), 90, np.uint8))
    assert (nothing.colour, nothing.count, nothing.direction, nothing.presence) == (None, 0, None, 0.0)
    with pytest.raises(ValueError, match=r"found float32 \[4, 64, 64, 3\]"):
        read_scene(frames[:4].astype(np.float32))


def test_objects_across_the_seam_are_one_and_motion_has_fractions() -> None:
    mask = np.zeros((64, 64), bool)
    mask[28:40, :6] = mask[28:40, -6:] = True
    assert len(components(mask)) == 1
    masks = np.zeros((30, 64, 64), bool)
    for t in range(30):
        start = round(0.4 * t)
        masks[t, 10:30, 5 + start : 25 + start] = True
    assert motion(masks) == pytest.approx((0.4, 0.0), abs=0.03)
    assert name_motion((0.0, -1.3), 64) == ("up", "fast") and name_motion((0.1, 0.1), 64) == ("still", None)
