"""Weights for the repository, and MLflow runs side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arlon_ray.artifact import load_artifact, save_artifact
from arlon_ray.bundle import Bundle
from arlon_ray.config import TrainingConfig, load_config
from arlon_ray.generation import VideoGenerator, default_options
from jobs.tracking import Tracking
from tests.bundles import make_random_bundle
from tests.scripts import run_script


def test_a_packed_bundle_is_small_whole_and_makes_the_same_video(tmp_path: Path) -> None:
    bundle = make_random_bundle(tmp_path / "bundle")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "README.md").write_text("kept")
    result = run_script("pack_weights", "--bundle", str(bundle), "--output", str(tmp_path / "packed"))
    assert result.returncode == 0, result.stderr
    whole, packed = Bundle(bundle), Bundle(tmp_path / "packed")
    for name in ("ar", "dit"):
        before, after = (part.artifacts[name] for part in (whole, packed))
        assert (
            after.path.joinpath("model.safetensors").stat().st_size
            < 0.7 * before.path.joinpath("model.safetensors").stat().st_size
        )
        stored = after.tensors()
        assert all(torch.allclose(stored[key], value, rtol=1e-3, atol=1e-6) for key, value in before.tensors().items())
    assert packed.artifacts["ar"].lineage.parents["full_precision"] == whole.artifacts["ar"].fingerprint
    assert packed.artifacts["vae"].fingerprint == whole.artifacts["vae"].fingerprint
    assert (tmp_path / "packed" / "README.md").read_text() == "kept"
    assert next(VideoGenerator(packed).generate(["a red circle"], 0)).shape == (34, 64, 64, 3)
    places = "--bundle", str(tmp_path / "packed"), "--output", str(tmp_path / "twice")
    again = run_script("pack_weights", *places, "--precision", "bf16", "--vae-precision", "bf16")
    assert again.returncode == 0, again.stderr
    assert load_artifact(tmp_path / "twice" / "ar", "ar").fingerprint
    twice = Bundle(tmp_path / "twice").config
    assert (twice.precision, twice.vae.precision) == ("bf16", "bf16") and packed.config.vae.precision == "fp32"


def test_an_average_lies_between_and_says_of_what(tmp_path: Path) -> None:
    parts = Bundle(make_random_bundle(tmp_path / "bundle")).artifacts
    one = parts["dit"]
    further = {name: value + torch.randn_like(value) for name, value in one.tensors().items()}
    other = save_artifact(
        tmp_path / "further", kind="dit", config=one.config, tensors=further, parents={"dit_init": "x"}
    )
    places = "--artifact", str(one.path), "--with", str(other.path), "--output", str(tmp_path / "between")
    result = run_script("average_weights", *places, "--share", "0.25")
    assert result.returncode == 0, result.stderr
    found = load_artifact(tmp_path / "between", "dit")
    for name, value in found.tensors().items():
        assert torch.allclose(value, 0.75 * one.tensors()[name] + 0.25 * further[name], rtol=1e-3, atol=1e-5)
    assert found.lineage.parents == {
        "dit_init": "x", "average_of": one.fingerprint, "and": other.fingerprint, "share": "0.25"
    }  # fmt: skip
    for more, reason in ((parts["ar"].path, "expected a dit artefact"), (tmp_path / "nothing", "nothing")):
        places = "--artifact", str(one.path), "--with", str(more), "--output", str(tmp_path / "wrong")
        wrong = run_script("average_weights", *places)
        assert wrong.returncode == 2 and reason in wrong.stderr and not (tmp_path / "wrong").exists()


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking, uri = Tracking(load_config("tiny"), tmp_path), f"sqlite:///{tmp_path}/mlflow.db"
    for name, rate in (("ar", 0.1), ("ar", 0.2), ("dit", 0.3)):
        training = TrainingConfig(steps=4, learning_rate=rate)
        with tracking.stage(name, key=f"{name}{rate}", training=training, parents={"vae": f"v{rate}"}) as run:
            for step in range(1, 5):
                run.metrics(step, {"loss": rate / step})
            run.picture("sampled", np.full((8, 8, 3), 200, np.uint8), 4)
    options = default_options(load_config("tiny").sampling)
    with tracking.row("a row", key="k", options=options, tags={"row": "guided@5"}, parents={}) as row:
        row.metrics(0, {"colour": 0.75})
    page = tmp_path / "compare.html"
    result = run_script("compare_runs", "--uri", uri, "--rows", "--output", str(page))
    assert result.returncode == 0 and "1 run" in page.read_text() and "guided@5" in page.read_text()
    result = run_script("compare_runs", "--uri", uri, "--stage", "ar", "--output", str(page))
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "2 runs side by side" in text and "dit" not in result.stdout
    # a curve of the loss, and a picture of each run
    assert text.count("data:image/png") >= 3 and "<figcaption>loss</figcaption>" in text
    assert "<tr class=differs><th>parent.vae</th><td>v0.2</td><td>v0.1</td></tr>" in text
    assert "<th>mlflow.source.git.commit</th>" in text or not Path(".git").exists()
    assert "learning_rate" in text[text.index("Settings that differ") :]
    for flags, expected in (
        (["--experiment", "none"], "no such experiment"), (["--runs", "xyz"], "--runs xyz: no such run"),
        (["--stage", "vae"], "no runs of stage vae"), (["--stage", "ar", "--rows"], "no runs of stage ar"),
        (["--count", "0"], "--count 0"),
    ):  # fmt: skip
        refused = run_script("compare_runs", "--uri", uri, *flags)
        assert refused.returncode == 2 and expected in refused.stderr and refused.stderr.count("\n") == 1


def test_stages_become_a_bundle(tmp_path: Path) -> None:
    whole = Bundle(make_random_bundle(tmp_path / "whole"))
    (tmp_path / "config.yaml").write_text(whole.config.model_dump_json())
    parts = {name: str(artifact.path) for name, artifact in whole.artifacts.items()}
    flags = [word for name, path in parts.items() for word in (f"--{name.replace('_', '-')}", path)]
    common = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "made")]
    result = run_script("make_bundle", *common, *flags)
    assert result.returncode == 0, result.stderr
    made = Bundle(tmp_path / "made")
    assert {n: a.fingerprint for n, a in made.artifacts.items()} == {
        n: a.fingerprint for n, a in whole.artifacts.items()
    }
    written = (made.path / "bundle.json").stat()
    assert run_script("make_bundle", *common, *flags).returncode == 0
    assert (made.path / "bundle.json").stat().st_ino == written.st_ino, "it was there already"
    (made.path / "ar" / "config.json").write_text("{}")
    assert run_script("make_bundle", *common, *flags).returncode == 0
    assert Bundle(made.path).artifacts["ar"].fingerprint == whole.artifacts["ar"].fingerprint
    other = Bundle(make_random_bundle(tmp_path / "other", "vqvae.fine.width=24"))
    mixed = run_script("make_bundle", *common, *flags, "--codec-fine", str(other.artifacts["codec_fine"].path))
    assert mixed.returncode == 2 and "was trained on codec_fine" in mixed.stderr and mixed.stderr.count("\n") == 1
    empty = run_script("make_bundle", *common)
    assert empty.returncode == 2 and "no parts" in empty.stderr
