"""All parts in one run, and the warning where one has fallen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench


def ratio(value: float, low: float, high: float, base: str = "peer") -> dict[str, Any]:
    """A comparison."""
    return {"times_as_fast": value, "from": low, "to": high, "base": base}


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
    names = ("a · fallen", "a · noisy", "a · same", "a · gone", "a · other", "a · transformers, bf16", "left out · x")
    before = {"comparisons": {name: ratio(2.0, 1.9, 2.1) for name in names}}
    found = {"a · fallen": ratio(1.5, 1.4, 1.6), "a · noisy": ratio(1.5, 1.0, 2.2), "a · same": ratio(1.9, 1.8, 2.0)}
    found |= {"a · other": ratio(1.0, 0.9, 1.1, "ours"), "a · transformers, bf16": ratio(0.5, 0.5, 0.5)}
    assert bench.fallen({"comparisons": found, "parts": {"a": {}}}, before) == [
        "warning: a · fallen: 1.50 times as fast; it was 2.00",
        "warning: a · gone: not compared with peer any more; it was 2.00",
        "warning: a · other: not compared with peer any more; it was 2.00",
    ]


def test_what_is_absent_is_named_in_the_table() -> None:
    works = {"transformers": {"error": "absent: transformers is not installed"}, "ours": ratio(2.0, 1.0, 3.0, "x")}
    values = {"ar": {"cases": [{"size": "tiny", "batch": 1, "works": works}], "error": ""}}
    shown = bench.table(dict(bench.comparisons(values)), bench.missing(values))
    assert "| ar · tiny, batch 1 · ours | x | 2.00 | 1.00–3.00 |" in shown
    assert "| ar · tiny, batch 1 · transformers | – | absent: transformers is not installed | – |" in shown
    assert len(shown.splitlines()) == 4


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
    better = {name: ratio(9.0, 9.0, 9.0, its["base"]) for name, its in found["comparisons"].items()}
    worse = {"machine": found["machine"], "comparisons": better}
    file.write_text(json.dumps(worse))
    bench.main(["--parts", "dit_step", "--against", str(file)])
    assert "warning: dit_step · tiny · step_s · ours" in capsys.readouterr().out


def test_what_it_is_compared_with_was_measured_on_such_a_processor() -> None:
    other, same = ({"machine": {"cpu": cpu}, "comparisons": {"a · x": ratio(9.0, 9.0, 9.0)}} for cpu in ("one", "two"))
    same["comparisons"]["a · x"].pop("base")  # as files of before are
    now = {"machine": {"cpu": "two"}, "parts": {"a": {}}, "comparisons": {"a · x": ratio(2.0, 2.0, 2.0)}}
    assert bench.against(now, [other, same]) == ["warning: a · x: 2.00 times as fast; it was 9.00"]
    assert bench.against(now, [other]) == ["nothing to compare with: this is two, what is there was measured on one"]
