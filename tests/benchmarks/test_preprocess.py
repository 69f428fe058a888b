"""The bare loop and the table of stages run on real rows, small and without Ray; bad flags end with one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from arlon_ray.config import load_config
from benchmarks import preprocess
from benchmarks.preprocess_stages import CAPTION, STAGES, collect
from data_pipeline.synthetic import write_samples
from jobs.command_line import run
from tests.bundles import save_random_vae

SETTINGS = ["video.height=32", "video.width=32", "data.bucket_groups=[2]", "data.encode_batch=4",
            "vae.width=16", "vae.deep_width=16", "vae.blocks=1"]  # fmt: skip
FILES, COPIES = 3, 2


def ended(monkeypatch: pytest.MonkeyPatch, *flags: str) -> object:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["preprocess", *flags])
    try:
        run(preprocess.main)
    except SystemExit as end:
        return end.code
    return 0


def test_rates_and_shares_are_those_of_real_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("tiny", SETTINGS)
    vae = save_random_vae(tmp_path / "vae", config.vae)
    write_samples(tmp_path / "in", FILES, 0, config.video, (2,))
    threads = torch.get_num_threads()
    monkeypatch.setattr(preprocess, "run_ray", lambda work: pytest.fail("Ray was started"))
    flags = [word for setting in SETTINGS for word in ("--set", setting)]
    flags += ["--input", str(tmp_path / "in"), "--vae", str(tmp_path / "vae"), "--copies", str(COPIES), "--runs", "2"]
    assert ended(monkeypatch, *flags, "--parts", "bare", "time", "--output", str(tmp_path / "found.json")) == 0

    found = json.loads((tmp_path / "found.json").read_text())
    assert found["clips"] == {"34x32x32": FILES * COPIES} and found["vae"] == vae.fingerprint
    assert set(found["time"]) == set(STAGES) and "ray" not in found and "scaling" not in found
    assert sum(row["share"] for row in found["time"].values()) == pytest.approx(1)
    assert min(row["seconds_per_clip"] for row in found["time"].values()) > 0
    assert len(found["bare"]["runs"]) == 2
    for figures in (*found["bare"]["runs"], found["bare"]["median"]):
        assert figures["seconds"] > 0 and figures["cpu_s_per_clip"] > 0
    # the rate is that of all clips; the median of two rates is not that of two times
    assert all(each["clips_per_s"] * each["seconds"] == pytest.approx(6) for each in found["bare"]["runs"])
    assert str(tmp_path / "in") not in json.dumps(found) and torch.get_num_threads() == threads
    assert "| bare |" in (printed := capsys.readouterr().out) and "| decode |" in printed


def test_copies_are_other_clips_with_a_caption_each(tmp_path: Path) -> None:
    config = load_config("tiny", SETTINGS)
    write_samples(tmp_path / "in", 2, 0, config.video, (2,))
    (tmp_path / "in" / "scene_000000.txt").unlink()
    (tmp_path / "in" / "scene_000000.json").unlink()
    (tmp_path / "copies").mkdir()
    work = collect(config, str(tmp_path / "in"), 3, tmp_path / "copies", tmp_path / "vae")
    assert len({row["clip_id"] for row in work.clips}) == len(work.clips) == 6
    captions = sorted(row["caption"] for row in work.clips)
    assert captions.count(CAPTION) == 3 and len(set(captions)) == 2
    assert [row for batch in work.batches() for row in batch] == work.clips


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runs", "0"], "--runs 0: expected at least 1"),
        (["--copies", "-1"], "--copies -1: expected at least 1"),
        (["--input", "nothing.mp4"], "not found"),
        (["--set", "data.encoder_gpus=1"], "not measured here"),
        (["--set", "data.nothing=1"], "data.nothing"),
        (["--output", "no/such/folder/found.json"], "its folder is not there"),
    ],
)
def test_bad_flags_end_with_code_2_and_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_input_without_clips_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, "--input", str(tmp_path), "--output", str(tmp_path / "found.json")) == 2
    assert "no clips in 0 videos" in capsys.readouterr().err and not (tmp_path / "found.json").exists()
