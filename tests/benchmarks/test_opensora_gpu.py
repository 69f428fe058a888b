"""The GPU script runs where there is none, at a small size, and says so where it is asked for one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import opensora_gpu


def test_it_measures_load_memory_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(opensora_gpu.CASES, "240p, 51 frames", (48, 64, 5))
    flags = ["--device", "cpu", "--depth", "2", "--hidden-size", "32", "--runs", "1", "--cases", "240p, 51 frames"]
    monkeypatch.setattr(sys, "argv", ["opensora_gpu", *flags, "--output", str(tmp_path / "result.json")])
    opensora_gpu.main()
    result = json.loads((tmp_path / "result.json").read_text())
    case = result["cases"]["240p, 51 frames"]
    assert set(case) == {"text-only", "guided"} and case["guided"]["tokens"] == 5 * 3 * 4
    assert result["load_s"] > 0 and case["guided"]["step_s"]["median"] > 0 and result["parameters"] > 1e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["opensora_gpu"])
    with pytest.raises(SystemExit) as ended:
        opensora_gpu.main()
    assert ended.value.code == 2 and "finds no GPU" in capsys.readouterr().err
