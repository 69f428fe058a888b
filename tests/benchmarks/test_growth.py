"""Cost against size: the line, and that whole videos of each size are made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import growth
from tests.bundles import make_random_bundle


def test_a_line_says_what_one_more_costs_and_how_straight_it_is() -> None:
    straight = growth.line([1, 2, 4, 8], [1.5, 2.5, 4.5, 8.5])
    assert straight["per_unit_s"] == pytest.approx(1) and straight["fixed_s"] == pytest.approx(0.5)
    assert straight["r2"] == pytest.approx(1)
    assert growth.line([1, 2, 4, 8], [1, 4, 16, 64])["r2"] < 0.99


def test_every_size_is_made_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, file = make_random_bundle(tmp_path / "bundle"), tmp_path / "growth.json"
    flags = ["--segments", "1", "2", "--pixels", "32", "64", "--batches", "1", "3", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["growth", "--bundle", str(bundle), *flags, "--output", str(file)])
    growth.main()
    found = json.loads(file.read_text())
    assert list(found["segments"]["seconds"]) == ["1", "2"] and list(found["tokens"]["seconds"]) == ["40", "160"]
    assert list(found["batch"]["seconds"]) == ["1", "3"]
    for part in ("segments", "tokens", "batch"):
        assert all(seconds > 0 for seconds in found[part]["seconds"].values())
