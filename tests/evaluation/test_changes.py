"""Readings before and after a change of the prompt, on rendered truths put one behind the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.config import load_config
from arlon_ray.evaluation.changes import change_figures
from data_pipeline.synthetic import render
from data_pipeline.worlds import held_out_scenes, turned
from tests.bundles import make_random_bundle
from tests.scripts import run_script


def test_a_change_that_comes_late_is_seen_late() -> None:
    scenes = held_out_scenes(load_config("tiny"), "measure", 3)
    found = []
    for _ in range(10):
        before, after = next(scenes), next(scenes)
        frames = np.concatenate([render(before)[:60], render(after)[:68]])
        late = np.concatenate([render(before)[:60], render(before)[60:68], render(after)[:60]])
        found.append((change_figures(frames, 60, before.shots[0], after.shots[0]),
                      change_figures(late, 60, before.shots[0], after.shots[0])))  # fmt: skip
    for name in ("object_class", "colour", "direction"):
        assert np.mean([at_once[f"before_{name}"] for at_once, _ in found]) >= 0.9, name
        assert np.mean([at_once[f"after_{name}"] for at_once, _ in found]) >= 0.9, name
    delays = [[each.get("delay_colour", 99) for each in pair] for pair in found]
    assert np.median([at_once for at_once, _ in delays]) == 0
    assert 2 <= np.median([late for _, late in delays]) <= 10


def test_what_never_comes_has_no_delay() -> None:
    scenes = held_out_scenes(load_config("tiny"), "measure", 3)
    scene = next(scene for scene in scenes if scene.shots[0].things[0].direction != "still")
    figures = change_figures(render(scene), 36, scene.shots[0], turned(scene).shots[0])
    assert (figures["before_direction"], figures["after_direction"]) == (1, 0) and "delay_direction" not in figures
    with pytest.raises(ValueError, match="the parts are too short"):
        change_figures(render(scene)[:50], 40, scene.shots[0], scene.shots[0])


def test_the_job_measures_both_kinds_of_change(tmp_path: Path) -> None:
    bundle = make_random_bundle(tmp_path / "bundle")
    options = ("--option", "steps=2", "--option", "ar_contrast=false", "--output", str(tmp_path / "out"))
    ended = run_script("evaluate_changes", "--bundle", str(bundle), "--count", "2", "--seconds", "2", *options)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "out" / "changes.json").read_text())
    assert found["direction"]["before_colour"]["videos"] == 2 and "after_action" in found["scene"]
    assert "| after_direction |" in ended.stdout and (tmp_path / "out" / "scene-1.png").stat().st_size > 1000
    assert found["options"] == {"steps": 2, "ar_contrast": False}
    unknown = run_script("evaluate_changes", "--option", "contrast=1", "--output", str(tmp_path / "out"))
    assert unknown.returncode == 2 and "--option: contrast" in unknown.stderr
    refused = run_script("evaluate_changes", "--seconds", "1", "--output", str(tmp_path / "out"))
    assert refused.returncode == 2 and "--seconds 1: expected 2 to 600" in refused.stderr
