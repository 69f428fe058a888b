"""Rows beside the base: what they cost, how far off they are, and which metrics are called worse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sampling
from jobs.evaluation import RowResult, parse_row
from tests.bundles import make_random_bundle


def test_rows_are_measured_beside_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BASE", "6"), ("REFERENCE", 12), ("DRAWS", 20)):
        monkeypatch.setattr(sampling, name, value)
    bundle, file = make_random_bundle(tmp_path / "bundle"), tmp_path / "sampling.json"
    ways = ["2:solver=heun", "6:cache_layers=1", "2:guidance_high=0"]
    flags = ["--bundle", str(bundle), "--count", "2", "--runs", "1", "--models", "guided", "--ways", *ways]
    sampling.main([*flags, "--output", str(file)])
    found = json.loads(file.read_text())["rows"]
    guided = [f"guided@{way}" for way in ("6", *ways)]
    assert list(found) == guided
    assert [found[name]["evaluations"] for name in guided] == [6, 3, 6, 2]
    # two branches of two layers: with one of them every second time, and with one branch
    assert [found[name]["work"] for name in guided] == pytest.approx([1, 1 / 2, 3 / 4, 1 / 6])
    assert all(row["latent_error"] > 0 and row["dit"]["median"] > 0 and row["metrics"] for row in found.values())
    assert found["guided@6"]["outside"] == [] and "| guided@6 | 6 | 1.00 |" in capsys.readouterr().out


def result(values: list[float], features: np.ndarray) -> RowResult:
    metrics = {i: {"action": value, "dynamic_degree": value} for i, value in enumerate(values)}
    return RowResult(parse_row("guided@5"), "", metrics, list(features))


def test_worse_is_what_lies_outside_of_the_base_s_interval() -> None:
    features = np.random.default_rng(0).normal(size=(40, 4))
    base = result([0.4, 0.6] * 20, features)
    same = sampling.differences(base, base, list(features))
    assert same["outside"] == [] and same["differences"]["action"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    worse = sampling.differences(result([0.3, 0.5] * 20, features + 1), base, list(features))
    assert worse["outside"] == ["action", "dynamic_degree", "frechet_video_distance"]
    assert worse["differences"]["action"]["high"] == pytest.approx(-0.1)
    better = sampling.differences(result([0.5, 0.7] * 20, features), base, list(features))
    assert better["outside"] == ["dynamic_degree"]
