"""The benchmark of the stages: what it measures is counted, held out where it says so, and kept in its file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import gpu_rates, stages
from benchmarks.stage_cases import STAGES, cases
from jobs.command_line import InputError


@pytest.mark.parametrize("stage", ["mp4", "text", "train_codec"])
def test_cases_are_counted_and_run(stage: str, tmp_path: Path) -> None:
    found = cases(stage, tmp_path, "cpu")
    assert sum(case.held_out for case in found) == STAGES[stage][2] and not found[0].held_out
    small, large = found[0], max(found, key=lambda case: case.work.flops + case.work.traffic)
    assert large.work.flops > small.work.flops or large.work.traffic > small.work.traffic
    (seconds,) = stages.measure([small], 1, "cpu")
    assert 0 < seconds < 60


def test_a_stage_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--stages vqvae: expected some of clip, vae_encode"):
        cases("vqvae", tmp_path, "cpu")


def test_stages_are_measured_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, threads = tmp_path / "found.json", torch.get_num_threads()
    for stage in ("text", "mp4"):
        words = ["stages", "--stages", stage, "--rounds", "1", "--output", str(file)]
        with mock.patch.object(sys, "argv", words):
            stages.main()
    torch.set_num_threads(threads)
    found = json.loads(file.read_text())["stages"]
    assert list(found) == ["text", "mp4"] and len(found["text"]["cases"]) == len(STAGES["text"][0])
    assert json.loads(capsys.readouterr().out.split("\n{", 1)[0])["device"] == "cpu"


def test_the_rates_of_the_h100_are_those_that_are_committed(tmp_path: Path) -> None:
    with mock.patch.object(sys, "argv", ["gpu_rates", "--output", str(tmp_path / "rates.json")]):
        gpu_rates.main()
    committed = Path(gpu_rates.__file__).parent / "results" / "stages_h100.json"
    assert json.loads((tmp_path / "rates.json").read_text()) == json.loads(committed.read_text())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"cases": {}}')
    words = ["gpu_rates", "--input", str(tmp_path / "other.json")]
    with mock.patch.object(sys, "argv", words), pytest.raises(InputError, match=r"not what benchmarks\.gpu wrote"):
        gpu_rates.main()
