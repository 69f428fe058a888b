"""What comes back is read right: on the truth all of it, on another object nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.evaluation.memory import GROUPS, return_figures
from data_pipeline.synthetic import render
from data_pipeline.worlds import caption, sample_scene
from tests.bundles import make_random_bundle
from tests.scripts import run_script


def test_on_rendered_scenes_all_comes_back() -> None:
    figures = [return_figures(render(sample_scene(seed, (GROUPS,), grade="returning"))) for seed in range(24)]
    means = {name: np.mean([figure[name] for figure in figures]) for name in figures[0]}
    assert means["gone"] == means["came_back"] == means["same_colour"] == means["same_place"] == 1.0
    assert means["same_shape"] > 0.95


def test_what_comes_back_as_another_is_not_the_same() -> None:
    scenes = [sample_scene(seed, (GROUPS,), grade="returning") for seed in range(24)]
    names = [(scene.shots[0].things[0].colour, scene.shots[0].things[0].shape) for scene in scenes]
    one = 0
    other = next(n for n, (colour, shape) in enumerate(names) if colour != names[0][0] and shape != names[0][1])
    frames = render(scenes[one])
    frames[-34:] = render(scenes[other])[-34:]
    assert return_figures(frames) == {
        "gone": 1.0, "came_back": 1.0, "same_colour": 0.0, "same_shape": 0.0, "same_place": 0.0,
    }  # fmt: skip
    frames[-34:] = render(scenes[one])[60:61]  # nothing comes back
    found = return_figures(frames)
    assert found["came_back"] == found["same_colour"] == found["same_place"] == 0.0
    frames[:34] = frames[60]  # and nothing was there
    assert return_figures(frames) == {"gone": 1.0}
    with pytest.raises(ValueError, match="118 frames: expected 119 and more"):
        return_figures(frames[:-1])


def test_half_of_the_captions_do_not_say_what_it_is() -> None:
    told = 0
    for seed in range(200):
        scene = sample_scene(seed, (GROUPS,), grade="returning")
        text, thing = caption(scene), scene.shots[0].things[0]
        assert (thing.colour in text) == (f"{thing.colour} {thing.shape}" in text)
        told += thing.colour in text
    assert 70 < told < 130


def test_the_job_compares_sinks(tmp_path: Path) -> None:
    bundle = make_random_bundle(tmp_path / "bundle", "ar.sink_groups=1", "sampling.steps=1")
    ended = run_script("evaluate_memory", "--bundle", str(bundle), "--count", "1", "--output", str(tmp_path / "out"))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert sorted(found) == ["tokens, sink 0", "tokens, sink 1", "video, sink 0", "video, sink 1"]
    assert all(row["gone"]["videos"] == 1 for row in found.values())
    assert len(list((tmp_path / "out").glob("sink1-video-*.png"))) == 1
    for flags, message in (
        (("--sinks", "9"), "--sinks: expected 0 to 2, the groups of a segment"),
        (("--count", "0"), "--count: expected 1 or more"),
    ):
        refused = run_script("evaluate_memory", "--bundle", str(bundle), *flags, "--output", str(tmp_path / "no"))
        assert refused.returncode == 2 and message in refused.stderr, refused.stderr
