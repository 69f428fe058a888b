"""The whole of training without Ray, at sizes that show only that it runs whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arlon_ray.bundle import Bundle
from benchmarks.train_box import main
from tests.bundles import SMALL

STAGES = ("vae", "vqvae.fine", "vqvae.coarse", "ar", "dit")


def test_every_stage_trains_within_its_time_and_the_bundle_is_measured(tmp_path: Path) -> None:
    settings = [*SMALL, *(f"{stage}.training.batch_size=4" for stage in STAGES), "vae.training.held_out=2"]
    flags = [word for setting in settings for word in ("--set", setting)]
    flags += [
        "--minutes",
        "0.02",
        "--videos",
        "24",
        "--shard",
        "24",
        "--processes",
        "1",
        "--count",
        "2",
        "--rows",
        "truth",
        "guided@2",
        "--device",
        "cpu",
    ]
    found = main([*flags, "--output", str(tmp_path)])
    assert found == json.loads((tmp_path / "results.json").read_text()) and found["rows"]["guided@2"]["videos"] == 2
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.guided and set(found["held_out"]) == {"vae", "codec_fine", "codec_coarse", "ar", "dit", "dit_base"}
    assert bundle.artifacts["dit"].lineage.parents["codec_fine"] == bundle.artifacts["codec_fine"].fingerprint

    begins = ["--videos", "8", "--shard", "8", "--steps", "dit=1", "--count", "0", "--start", str(bundle.path)]
    drawn = ["--set", "dit.ar_token_probability=0.5"]
    main([*flags, *begins, *drawn, "--only", "dit", "--anew", "--output", str(tmp_path / "anew")])
    anew = Bundle(tmp_path / "anew" / "bundle").artifacts
    parents = anew["dit"].lineage.parents
    assert "dit_init" not in parents and anew["ar"].fingerprint == bundle.artifacts["ar"].fingerprint
    assert parents["ar_tokens"] == anew["ar"].fingerprint


def test_what_begins_anew_is_named() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--anew"])
    assert ended.value.code == 2
