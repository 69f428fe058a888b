"""Every stage runs 20 seeded steps and follows a committed loss curve; `python -m tests.training.test_golden_losses`
writes the curves anew (say in the commit why they moved)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arlon_ray.artifact import load_artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import Stage
from arlon_ray.training.loop import train_locally
from arlon_ray.training.stages.ar import ArPaths, ArStage
from arlon_ray.training.stages.codec import CodecStage
from arlon_ray.training.stages.dit import DitPaths, DitStage
from arlon_ray.training.stages.vae import VaeStage
from tests.bundles import make_random_parts, small_config
from tests.training.recording import Recorder
from tests.training.sources import ToySource

GOLDEN = Path(__file__).parent / "golden"
STEPS, TOLERANCE = 20, 0.02
NAMES = ("vae", "vqvae_fine", "vqvae_coarse", "ar", "dit_base", "dit")
TRAINING: dict[str, Any] = {
    "steps": STEPS, "batch_size": 8, "warmup_steps": 5, "log_every": 1, "checkpoint_every": 10, "precision": "fp32",
    "held_out": 4, "schedule": "constant", "ema_decay": 0.9,
}  # fmt: skip


class MovingSquares:
    """Pixels for the VAE: bright squares that move over a dark ground."""

    def training(self, seed: int, count: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        frames = np.full((count, 17, 32, 32, 3), 40, np.uint8)
        for clip in frames:
            left, colour = rng.integers(0, 16), rng.integers(80, 255, 3)
            for t, frame in enumerate(clip):
                frame[10:22, (left + t) % 20 : (left + t) % 20 + 12] = colour
        return frames

    def held_out(self, count: int) -> np.ndarray:
        return self.training(10**9, count)


def training(optimizer: str) -> TrainingConfig:
    return TrainingConfig(**TRAINING, optimizer=optimizer, learning_rate=2e-3, muon_learning_rate=0.01)


def build(name: str, parts: dict[str, Path]) -> Stage:
    """The stage `name` at minimal sizes, over toy data."""
    config = small_config()
    muon, adamw = training("muon"), training("adamw")
    if name == "vae":
        return VaeStage(config.vae.model_copy(update={"training": muon}), MovingSquares(), 0)
    source = ToySource(config, 8)
    if name.startswith("vqvae"):
        role = name.removeprefix("vqvae_")
        codec = getattr(config.vqvae, role).model_copy(update={"training": adamw})
        return CodecStage(codec, role, config.vae.latent_channels, source, parts["vae"], {}, 0)  # type: ignore[arg-type]
    if name == "ar":
        ar = config.ar.model_copy(update={"training": adamw})
        return ArStage(
            config.model_copy(update={"ar": ar}), source, ArPaths(parts["codec_fine"], parts["vae"]), {"vae": "x"}
        )
    injection = config.dit.injection.model_copy(update={"enabled": name == "dit"})
    dit = config.dit.model_copy(update={"training": muon, "injection": injection})
    codecs = (parts["codec_fine"], parts["codec_coarse"]) if name == "dit" else (None, None)
    return DitStage(config.model_copy(update={"dit": dit}), source, DitPaths(parts["vae"], *codecs), {"vae": "x"})


def curve(name: str, parts: dict[str, Path], folder: Path) -> list[float]:
    """Losses of the 20 steps."""
    torch.set_num_threads(1)
    recorder = Recorder()
    train_locally(build(name, parts), folder / name, reporter=recorder)
    return [recorder.values[step]["loss"] for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_random_parts(tmp_path_factory.mktemp("parts"), small_config())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_follows_its_golden_curve_and_falls(name: str, parts: dict[str, Path], tmp_path: Path) -> None:
    losses = curve(name, parts, tmp_path)
    assert len(losses) == STEPS
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert losses == pytest.approx(golden, rel=TOLERANCE)
    assert sum(losses[-4:]) < sum(losses[:4])
    artifact = load_artifact(tmp_path / name, name.split("_")[0].replace("vqvae", "codec"))
    assert artifact.lineage.metrics


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = make_random_parts(Path(temporary) / "parts", small_config())
        GOLDEN.mkdir(exist_ok=True)
        for stage_name in NAMES:
            values = curve(stage_name, made, Path(temporary))
            (GOLDEN / f"{stage_name}.json").write_text(json.dumps([round(v, 5) for v in values]) + "\n")
