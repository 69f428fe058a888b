"""Every job: help, and bad input that ends with exit code 2 and one line before Ray starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from arlon_ray.generation.video import read_video
from tests.bundles import SMALL, make_random_bundle
from tests.scripts import run_script

ROOT = Path(__file__).resolve().parents[2]
JOBS = [
    "preprocess", "render_samples", "train_vae", "train_vqvae", "extract_tokens", "train_ar", "train_dit", "generate",
    "pipeline", "serve_bundle", "import_opensora",
    "evaluate", "tune",
]  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_help_names_the_flags(name: str) -> None:
    result = run_script(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "--output" in result.stdout


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("pipeline", ["--config", "tinny"], "neither a file nor one of the presets"),
        ("pipeline", ["--set", "dit.trainin.steps=3"], "did you mean dit.training?"),
        ("pipeline", ["--input", "/no/such/folder"], "--input /no/such/folder: not found"),
        ("preprocess", ["--input", ""], "--input: empty; expected a path"),
        ("import_opensora", [], "nothing to do: name --stdit, --vae or --text"),
        ("train_vae", ["--input", "FOLDER=-1"], "must be above 0"),
        ("train_vqvae", ["--dataset", "DIR", "--set", "seed=x"], "seed='x'"),
        ("train_ar", ["--dataset", "DIR", "--codec-fine", "DIR", "--vae", "DIR"], "--tokens"),
        ("train_dit", ["--dataset", "DIR", "--vae", "DIR"], "--codec-fine and --codec-coarse are needed"),
        ("train_dit", ["--dataset", "DIR", "--vae", "DIR", "--set", "dit.injection.enabled=false"], "manifest.json"),
        ("train_dit", ["--dry-run", "--set", "dit.training.batch_size=7"], "cannot be split evenly"),
        ("tune", ["--stage", "ar", "--space", "/no/space", "--dataset", "DIR"], "--space /no/space: not found"),
        ("generate", ["--bundle", "DIR", "--prompt", "x"], "not a bundle"),
        ("generate", ["--bundle", "DIR", "--prompt", " "], "--prompt: empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(name: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    filled = [a.replace("FOLDER", str(tmp_path)).replace("DIR", str(tmp_path)) for a in arguments]
    result = run_script(name, *filled, *(["--output", str(tmp_path / "out")] if name != "generate" else []))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "ray" not in result.stdout.lower()


@pytest.mark.parametrize("name, parts", [("vae", 1), ("vqvae", 2), ("ar", 1), ("dit", 1)])
def test_a_dry_run_needs_no_data_and_says_what_fits(name: str, parts: int) -> None:
    smaller = [word for setting in SMALL for word in ("--set", setting)]
    result = run_script(f"train_{name}", "--dry-run", "--memory-gib", "0.01", *smaller)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 workers, ZeRO 1") == parts == result.stdout.count("does not fit into 10.2 MiB")
    assert "activations at the peak" in result.stdout


def test_an_output_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run_script("pipeline", "--output", str(tmp_path / "file" / "x"))
    assert result.returncode == 2
    assert "cannot be created" in result.stderr


def test_generate_writes_a_video_without_ray(tmp_path: Path) -> None:
    """As a command of its own, from another folder."""
    bundle, path = make_random_bundle(tmp_path / "bundle"), tmp_path / "video.mp4"
    flags = ["--prompt", "a red circle", "--prompt", "a blue one", "--segments", "3", "--output", str(path)]
    command = [sys.executable, str(ROOT / "jobs" / "generate.py"), "--bundle", str(bundle), *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    assert read_video(path).shape == (34 + 17 + 17, 64, 64, 3)
    refused = run_script("generate", "--bundle", str(bundle), "--prompt", "a", "--prompt", "b", "--segments", "1")
    assert refused.returncode == 2 and "2 prompts for 1 segments" in refused.stderr
    refused = run_script("generate", "--bundle", str(bundle), "--prompt", "a", "--steps", "0")
    assert refused.returncode == 2 and "--steps=0" in refused.stderr
