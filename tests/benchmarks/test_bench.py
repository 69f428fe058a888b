"""All parts in one run, and the warning where one has fallen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench


def ratio(value: float, low: float, high: float) -> dict[str, float]:
    """A comparison."""
    return {"times_as_fast": value, "from": low, "to": high}


def test_everything_that_was_compared_is_found_by_its_name() -> None:
    works = {"peer": {"seconds": ratio(1.0, 1.0, 1.0)}, "ours": {"seconds": ratio(3.0, 2.5, 3.5)}}
    values = {
        "ar": {"cases": [{"size": "tiny", "batch": 8, "works": works}]},
        "dit": {"step_s": {"ours": ratio(2, 1, 3)}},
    }
    assert dict(bench.comparisons(values)) == {
        "ar · tiny, batch 8 · ours": ratio(3.0, 2.5, 3.5),
        "dit · step_s · ours": ratio(2.0, 1.0, 3.0),
    }


def test_only_what_is_clearly_worse_than_before_is_warned_of() -> None:
    before = {name: ratio(2.0, 1.9, 2.1) for name in ("fallen", "noisy", "same", "gone")}
    now = {"fallen": ratio(1.5, 1.4, 1.6), "noisy": ratio(1.5, 1.0, 2.2), "same": ratio(1.9, 1.8, 2.0)}
    assert bench.fallen(now, before) == ["warning: fallen: 1.50 times as fast; it was 2.00"]


def test_parts_run_by_themselves_and_a_broken_one_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.PARTS, "dit_step", ("--sizes tiny --runs 2 --steps 1", None))
    monkeypatch.setitem(bench.PARTS, "vae_decode", ("--bundle /nowhere", None))
    file = tmp_path / "bench.json"
    found = bench.main(["--parts", "vae_decode", "dit_step", "--output", str(file)])
    assert found["parts"]["vae_decode"]["error"] and "dit_step · tiny · step_s · ours" in found["comparisons"]
    assert json.loads(file.read_text())["comparisons"] == found["comparisons"]
    shown = capsys.readouterr().out
    assert "| dit_step · tiny · step_s · ours |" in shown
    worse = {"comparisons": {name: ratio(9.0, 9.0, 9.0) for name in found["comparisons"]}}
    file.write_text(json.dumps(worse))
    bench.main(["--parts", "dit_step", "--against", str(file)])
    assert "warning: dit_step · tiny · step_s · ours" in capsys.readouterr().out
