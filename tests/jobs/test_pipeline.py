"""The main job: real mp4 files in, a served long video out; run again it skips all that is done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from arlon_ray import mirror
from arlon_ray.artifact import load_artifact
from arlon_ray.bundle import load_bundle
from arlon_ray.config import load_config, override
from arlon_ray.generation.video import read_video
from benchmarks.codebooks import main as compare_codebooks
from data_pipeline.synthetic import write_samples
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.app import serve_bundle
from tests.bundles import SMALL
from tests.s3 import s3_server

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("vqvae.fine", "vqvae.coarse", "ar", "dit")
QUICK = [
    *(f"{stage}.training.{setting}" for stage in STAGES for setting in ("steps=4", "batch_size=4", "held_out=2")),
    "dit.base_steps=4",
    *(item for item in SMALL if not item.startswith("vae.")),
]


def command(folder: str | Path, videos: Path) -> list[str]:
    overrides = [word for setting in QUICK for word in ("--set", setting)]
    job = str(ROOT / "jobs" / "pipeline.py")
    return [sys.executable, job, "--output", str(folder), "--input", str(videos), *overrides]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_samples(folder, 24, 0, load_config("tiny").video, (2, 3))
    (folder / "broken.mp4").write_bytes(b"not a video")
    (folder / "broken.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pipeline that the first test runs."""
    return tmp_path_factory.mktemp("pipeline") / "run"


def test_raw_video_to_served_video_and_again(videos: Path, output: Path) -> None:
    first = subprocess.Popen(
        command(output, videos), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # Ctrl-C in the middle of the second stage that trains
    assert first.stdout is not None
    seen = ""
    for line in first.stdout:
        seen += line
        if "── vqvae coarse" in line:
            time.sleep(1)
            os.kill(first.pid, signal.SIGINT)
            break
    first.communicate(timeout=120)
    assert first.returncode == 130, seen
    assert load_artifact(output / "codec_fine", "codec")

    second = subprocess.run(command(output, videos), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "vqvae_fine" not in second.stdout, "the finished codec was trained again"
    report = json.loads((output / "dataset" / "report.json").read_text())
    assert report["total"] == {"in": 25, "kept": 24, "filtered": 0, "failed": 1}
    assert report["sources"]["broken.mp4"] == {"in": 1, "kept": 0, "filtered": 0, "failed": 1}
    video = read_video(output / "demo.mp4")
    assert video.shape == (34 + 5 * 17, 64, 64, 3) == read_video(output / "baseline.mp4").shape
    assert (output / "demo.png").stat().st_size > 1000
    bundle = load_bundle(output / "bundle")
    lineage = bundle.artifacts["dit"].lineage
    assert lineage.parents["codec_fine"] == bundle.artifacts["codec_fine"].fingerprint
    assert lineage.parents["dit_init"] == bundle.artifacts["dit_base"].fingerprint
    _check_runs(output)

    third = subprocess.Popen(
        command(output, videos), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert third.stdout is not None
    begin, seen = time.monotonic(), ""
    for line in third.stdout:
        seen += line
        if "── serve" in line:
            os.kill(third.pid, signal.SIGINT)
            break
    third.communicate(timeout=120)
    assert "samples/s" not in seen and time.monotonic() - begin < 60, f"something was done again: {seen}"


@pytest.mark.slow
def test_variants_of_its_bundle_and_codebooks_on_its_data(videos: Path, output: Path, tmp_path: Path) -> None:
    if not (output / "bundle").exists():  # this test was asked for alone
        subprocess.run(command(output, videos), cwd=ROOT, check=True, timeout=500)
    _check_ablation(output, tmp_path / "ablation")
    _check_codebooks(output, tmp_path / "codebooks.json")


@pytest.mark.slow
def test_into_a_bucket_and_served_from_there_by_another_node(videos: Path, tmp_path: Path, monkeypatch) -> None:
    with s3_server("runs") as options:
        run = f"s3://runs/tiny{options}"
        words = command(run, videos)
        monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / "one"))
        for again in (False, True):
            ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900)
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert ("(there already)" in ended.stdout) == again and ("samples/s" in ended.stdout) != again
        bundle = f"s3://runs/tiny/bundle{options}"
        assert f"--bundle '{bundle}'" in ended.stdout

        monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / "two"))
        opened = load_bundle(mirror.local(bundle))
        config = override(opened.config, [f"serve.port={free_port()}"])
        with connect(config), serve_bundle(config, opened, tmp_path / "served") as url:
            client = httpx.Client(base_url=url, timeout=60)
            video = client.post("/v1/videos", json={"prompt": "a red ball", "num_segments": 2, "seed": 1}).json()
            begin = time.monotonic()
            while video["status"] not in ("completed", "failed"):
                assert time.monotonic() - begin < 120, video
                time.sleep(0.2)
                video = client.get(f"/v1/videos/{video['id']}").json()
            assert video["status"] == "completed", video
            (tmp_path / "a.mp4").write_bytes(client.get(f"/v1/videos/{video['id']}/content").content)
        assert read_video(tmp_path / "a.mp4").shape == (34 + 17, 64, 64, 3)


def _check_ablation(output: Path, results: Path) -> None:
    """Two variants of the pipeline's own bundle, and the page."""
    parts = ["--bundle", output / "bundle", "--dataset", output / "dataset", "--tokens", output / "tokens"]
    flags = ["--steps", "2", "--ar-steps", "2", "--count", "2", "--output", results, "--docs", results / "page.md"]
    command = [sys.executable, ROOT / "jobs" / "ablate.py", *parts, *flags, "--variants", "controlnet", "ar-frame"]
    for more in (["--train-only"], []):
        words = [str(part) for part in [*command, *more]]
        ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert (results / "models" / "ar-frame").is_dir() and (results / "page.md").exists() == (not more)
    assert "steps/s" not in ended.stdout and "samples/s" not in ended.stdout, "trained again"
    page = (results / "page.md").read_text()
    assert "| controlnet | guided@5 |" in page and "| ar-frame | guided@5 |" in page
    base = load_bundle(output / "bundle").artifacts["dit_base"].fingerprint
    trained = load_artifact(results / "models" / "controlnet", "dit")
    assert trained.lineage.parents["dit_init"] == base and trained.config["injection"]["kind"] == "controlnet"
    assert load_artifact(results / "models" / "ar-frame", "ar").config["block"] == [4, 4]
    found = json.loads((results / "controlnet" / "results.json").read_text())
    assert found["rows"]["true-tokens@5"]["videos"] == 2 and found["parts"]["dit guided, a step"]["flops"] > 0


def _check_codebooks(output: Path, written: Path) -> None:
    """The comparison of codebooks on the pipeline's dataset, at sizes that show only that it runs whole."""
    vae = load_bundle(output / "bundle").path / "vae"
    sizes = [f"vqvae.fine.{setting}" for setting in ("training.batch_size=4", "training.held_out=2", "width=16")]
    flags = ["--dataset", output / "dataset", "--vae", vae, "--steps", "3", "--scenes", "2", "--output", written]
    flags += ["--kinds", "cosine", "fsq 8·8·8", *(word for setting in sizes for word in ("--set", setting))]
    found = compare_codebooks([str(flag) for flag in flags])["codebooks"]
    assert list(found) == ["cosine", "fsq 8·8·8"] and json.loads(written.read_text())["codebooks"] == found
    assert all(0 <= row["kept_direction"] <= 1 and row["relative_error"] > 0 for row in found.values())


def _check_runs(output: Path) -> None:
    """Every stage is a finished MLflow run under one parent, with losses and pictures."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("arlon-ray")
    runs = client.search_runs([experiment.experiment_id])
    stages = {run.data.tags["stage"]: run for run in runs if "stage" in run.data.tags and run.info.status == "FINISHED"}
    assert set(stages) == {"vqvae_fine", "vqvae_coarse", "ar", "dit_base", "dit"}
    parents = {run.data.tags["mlflow.parentRunId"] for run in stages.values()}
    assert parents <= {run.info.run_id for run in runs}
    for name, run in stages.items():
        assert len(client.get_metric_history(run.info.run_id, "loss")) >= 2, name
        assert "samples_per_s" in run.data.metrics
        assert client.list_artifacts(run.info.run_id), name
