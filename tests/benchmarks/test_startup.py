"""The start is measured part by part, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import startup
from benchmarks.gpu_sampling import xl2


@pytest.mark.slow
def test_it_measures_imports_bundle_and_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "xl2", lambda small: xl2(True))
    seconds = startup.measured(Path("weights/tiny").resolve(), 1, 2)["seconds"]
    assert seconds["arlon_ray"]["arlon_ray"]["median"] < seconds["arlon_ray"]["generation"]["median"]
    parts = seconds["ready"]
    assert set(parts) == {"torch", "imports", "open", "vae", "codec", "ar", "dit", "text", "ready"}
    assert (
        parts["ready"]["median"]
        >= sum(its["median"] for name, its in parts.items() if name not in ("torch", "ready")) - 0.1
    )
    assert seconds["xl2"]["load"]["median"] > 0 and seconds["xl2"]["parameters"]["median"] > 1e6


def test_spread_is_over_the_runs_behind_the_first(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = (
        f"import json, pathlib; p = pathlib.Path({str(count)!r}); n = int(p.read_text()) + 1 if p.exists() else 0; "
        "p.write_text(str(n)); print(json.dumps({'n': n}))"
    )
    assert startup.in_new_processes({"x": code}, 3) == {"x": {"n": {"median": 2, "min": 1, "max": 3}}}
