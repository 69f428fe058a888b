"""jobs/plan.py as a command: what it prints, and what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from jobs.plan import number
from jobs.plan_tables import dollars, hours, size
from tests.bundles import SMALL
from tests.scripts import run_script

SETTINGS = [word for setting in SMALL for word in ("--set", setting)]
TINY = ("--config", "tiny", *SETTINGS, "--gpus", "0", "--cpu-cores", "64")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10M", 1e7), ("2k", 2e3), ("1.5TB", 1.5e12), ("25 GB/s", 25e9), ("500", 500), ("1_000", 1e3), (".5", 0.5),
        ("4m", 4e6), ("3B", 3), ("100Mbits", 1e8),
    ],
)  # fmt: skip
def test_numbers_have_letters(text: str, expected: float) -> None:
    assert number(text) == expected


@pytest.mark.parametrize("text", ["", "M", "ten", "-5", "1e6", "10X", "1.2.3", "5 apples", "nan"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as"):
        number(text)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--videos", "many"), "argument --videos: 'many': expected a number such as 500, 2k, 10M or 1.5TB"),
        (("--videos", "0"), "argument --videos: '0': expected a number above 0"),
        (("--gpus", "1.5"), "argument --gpus: '1.5': expected a whole number"),
        (("--gpu", "h900"), "argument --gpu: invalid choice: 'h900'"),
        (("--source-size", "720p"), "argument --source-size: '720p': expected HEIGHTxWIDTH"),
        (("--seconds-per-video", "1"), "--seconds-per-video: videos of 1 s give no clip: the shortest is 2.12 s"),
        (("--gpus-per-node", "0"), "--gpus-per-node 0: expected at least 1"),
        (("--requests-per-hour", "5", "--segments", "0"), "--segments 0: expected at least 1"),
        (("--requests-per-hour", "5", "--busy", "1"), "--busy 1: expected a share above 0 and below 1"),
        (("--rates", "nowhere.json"), "nowhere.json: not found"),
        (("--set", "dit.dept=3"), "unknown key dit.dept; did you mean dit.depth?"),
    ],
)
def test_bad_input_ends_with_one_line(words: tuple[str, ...], expected: str) -> None:
    ended = run_script("plan", *TINY, *words)
    assert ended.returncode == 2 and not ended.stdout
    assert expected in ended.stderr.splitlines()[-1]


def test_a_file_without_rates_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("{}")
    ended = run_script("plan", *TINY, "--rates", str(tmp_path / "rates.json"))
    assert ended.returncode == 2 and "no rates as benchmarks.stages writes them" in ended.stderr


def test_the_plan_as_a_table_and_as_json() -> None:
    words = (*TINY, "--videos", "10k", "--requests-per-hour", "600")
    shown, told = run_script("plan", *words), run_script("plan", *words, "--json")
    assert shown.returncode == told.returncode == 0, shown.stderr + told.stderr
    found = json.loads(told.stdout)
    names = [stage["name"] for stage in found["stages"]]
    assert names == [
        "preprocess",
        "extract tokens",
        *(f"train {s}" for s in ("vqvae_fine", "vqvae_coarse", "ar", "dit")),
    ]
    assert found["hours"] == pytest.approx(sum(stage["hours"] for stage in found["stages"]))
    slowest = max(found["stages"], key=lambda stage: stage["hours"])
    assert found["bottleneck"] == f"{slowest['name']}: {slowest['bottleneck']}"
    for expected in (*names, f"bottleneck: {found['bottleneck']}", "first segment after", dollars(found["money"])):
        assert expected in shown.stdout
    assert found["gpu_hours"] == 0 and found["serving"]["replicas"][1] >= 1


def test_what_fits_is_told() -> None:
    ended = run_script("plan", *TINY, "--memory", "--json", "--set", "dit.depth=2")
    assert ended.returncode == 0, ended.stderr
    memory = json.loads(ended.stdout)["memory"]
    states = [row["states"] for row in memory["training"] if row["stage"] == "dit"]
    # what is split has room set aside for it to be exchanged in
    assert len(states) == 4 and states[1] > states[2] > states[3]
    assert all(row["largest_micro_batch"] > 0 for row in memory["training"])
    assert [row["precision"] for row in memory["inference"]] == ["fp32", "bf16", "int8"]
    assert memory["inference"][0]["fits"]["8 GB"] == "yes"


def test_figures_are_short() -> None:
    assert (size(999), size(1.5e12), size(3.25e15)) == ("999 B", "1.5 TB", "3.25 PB")
    assert (hours(0.01234), hours(1234.5), dollars(3.456), dollars(1234.5)) == ("0.0123", "1,234", "$3.46", "$1,234")
