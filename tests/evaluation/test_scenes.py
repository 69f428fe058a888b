"""Readings are right on ground truth, and at chance on other scenes' truth; in both grades."""

from __future__ import annotations

import numpy as np
import pytest

from arlon_ray.evaluation.scenes import (
    SIMPLE_ACTIONS,
    Reading,
    components,
    motion,
    read_deed,
    read_relation,
    read_scene,
)
from arlon_ray.evaluation.world import ACTIONS, DIRECTIONS, RELATIONS, SPEEDS, Deed, Shot, Thing, deed_of, deeds, track
from data_pipeline.synthetic import render, render_shot, sample_scene

COUNT = 90
Pairs = list[tuple[Shot, Reading]]


@pytest.fixture(scope="module")
def read() -> Pairs:
    shots = [sample_scene(900_000 + i, (2,)).shots[0] for i in range(COUNT)]
    return [(shot, read_scene(render_shot(shot, 64, 64))) for shot in shots]


@pytest.fixture(scope="module")
def read_rich() -> Pairs:
    shots = [shot for i in range(COUNT) for shot in sample_scene(i, (2,), grade="rich").shots if shot.frames == 34]
    return [(shot, read_scene(render_shot(shot, 64, 64), ACTIONS)) for shot in shots]


def matches(shot: Shot, reading: Reading) -> dict[str, bool]:
    """What of a reading is what the shot says."""
    by_colour = {seen.colour: seen for seen in reading.things}
    seen = [by_colour.get(thing.colour) for thing in shot.things]
    truth = sorted((thing.colour, thing.shape) for thing in shot.things)
    deed = [s is not None and s.deed == deed_of(t) for s, t in zip(seen, shot.things, strict=True)]
    way = [s is not None and s.deed.direction == deed_of(t).direction for s, t in zip(seen, shot.things, strict=True)]
    found = {
        "objects": truth == sorted((s.colour, s.shape) for s in reading.things for _ in range(s.count)),
        "colour": {thing.colour for thing in shot.things} <= set(by_colour),
        "deed": all(deed),
        "direction": all(way),
        "pan": bool(np.abs(np.array(reading.pan) - np.array(DIRECTIONS[shot.pan]) * SPEEDS["normal"]).max() < 0.2),
    }
    if shot.relation is not None and seen[0] is not None and seen[1] is not None:
        x, y = read_relation(seen[0], seen[1], (64, 64))
        across = RELATIONS[shot.relation]
        found["relation"] = across[0] * x + across[1] * y > abs(across[0] * y - across[1] * x)
    return found


def share(pairs: Pairs, what: str) -> float:
    told = [found[what] for found in (matches(*pair) for pair in pairs) if what in found]
    assert len(told) > 15
    return sum(told) / len(told)


@pytest.mark.parametrize("what", ["objects", "colour", "deed", "direction", "relation", "pan"])
def test_ground_truth_is_read(read: Pairs, read_rich: Pairs, what: str) -> None:
    assert share(read, what) >= 0.98
    assert share(read_rich, what) >= 0.95


@pytest.mark.parametrize("what, chance", [("objects", 0.04), ("colour", 0.17), ("direction", 0.2), ("deed", 0.1)])
def test_other_scenes_truth_is_met_by_chance_alone(read: Pairs, read_rich: Pairs, what: str, chance: float) -> None:
    shuffled = [(read[i][0], read[(i + shift) % COUNT][1]) for shift in (7, 31, 59) for i in range(COUNT)]
    # objects of other colours have no deed of their own: the same objects, told to do what those of others do
    if what in ("direction", "deed"):
        told = [
            deed_of(a.things[0]) == seen.deed
            if what == "deed"
            else deed_of(a.things[0]).direction == seen.deed.direction
            for a, reading in shuffled
            for seen in reading.things[:1]
        ]
        assert sum(told) / len(told) == pytest.approx(chance, abs=0.07)
    else:
        assert share(shuffled, what) == pytest.approx(chance, abs=0.07)
    rich = [(read_rich[i][0], read_rich[(i + 11) % len(read_rich)][1]) for i in range(len(read_rich))]
    assert share(rich, what) <= chance + 0.03


def test_every_deed_has_a_track_of_its_own() -> None:
    """Any two that a caption tells apart differ by a pixel or more somewhere in a segment, `grow` by its size."""
    seen = [deed for deed in deeds(ACTIONS) if deed.action not in ("grow", "bounce")]
    places = np.array([deed.offsets(34) for deed in seen])
    for i in range(len(seen)):
        assert (np.abs(places[i + 1 :] - places[i]).max((1, 2)) > 1).all()
    _, _, radius = track(Thing("circle", "red", 10.0, (0.0, 0.0), "grow", "still", "normal"), 34, 1.0)
    assert radius[-1] == pytest.approx(1.7 * radius[0])


def test_presence_and_nothing() -> None:
    frames = render(sample_scene(1, (2,)))
    half = frames.copy()
    half[17:] = 100
    assert read_scene(frames).presence == 1.0 and read_scene(half).presence == 0.5
    nothing = read_scene(np.full((4, 64, 64, 3), 90, np.uint8))
    assert nothing.things == () and nothing.presence == 0.0
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
    assert read_deed(masks, deeds(SIMPLE_ACTIONS), 64) == Deed("move", "right", "slow")
    assert read_deed(masks, deeds(SIMPLE_ACTIONS), 256) == Deed("still")
