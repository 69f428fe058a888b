"""Results of several evaluations as one file and one picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from benchmarks.wrong_tokens import main
from jobs.command_line import InputError


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.wrong_tokens", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_curves_side_by_side(tmp_path: Path) -> None:
    names = ["action", "object_class", "spatial_relationship", "subject_consistency", "multiple_objects"]
    for variant, slope in (("with", 0.2), ("without", 1.0)):
        rows = {
            f"true-tokens@5{f':wrong={share}' if share else ''}": {
                "metrics": {name: {"mean": 1 - slope * share} for name in names}
            }
            for share in (0, 0.1, 0.3, 0.5)
        }
        (tmp_path / f"{variant}.json").write_text(json.dumps({"rows": rows}))
    variants = [f"{name}={tmp_path / name}.json" for name in ("with", "without")]
    made = command(
        "--variants", *variants, "--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    found = json.loads((tmp_path / "out.json").read_text())["variants"]
    assert found["without"]["true-tokens@5:wrong=0.5"]["metrics"]["action"]["mean"] == 0.5
    picture = cv2.imread(str(tmp_path / "out.png"))
    assert picture.shape[1] > picture.shape[0] and len(set(map(tuple, picture.reshape(-1, 3)))) > 50


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, its in (("few", '{"rows": {}}'), ("none", "none"), ("list", "[]")):
        (tmp_path / f"{name}.json").write_text(its)
    output = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    for given, told in (
        ("few", "expected NAME=RESULTS"),
        ("a=nowhere.json", "nowhere.json"),
        (f"a={tmp_path}/few.json", "three at least"),
        (f"a={tmp_path}/none.json", "expected a results.json"),
        (f"a={tmp_path}/list.json", "expected a results.json"),
        (f"a={tmp_path}/few.json a={tmp_path}/few.json", "another NAME"),
    ):
        monkeypatch.setattr(sys, "argv", ["wrong_tokens", "--variants", *given.split(), *output])
        with pytest.raises(InputError, match=told):
            main()
    assert not (tmp_path / "out.json").exists()
