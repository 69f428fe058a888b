"""A real, small stage for the tests of the loop and of the engines: an MLP that learns a fixed random map."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arlon_ray.artifact import Artifact, save_artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import Evaluation, Losses


class Regression(nn.Module):
    """Images [B, 4, 6, 6] to numbers [B, 5]: a convolution, a matrix, an embedding-like input layer, dropout, noise."""

    muon_excluded = ("entry", "exit")

    def __init__(self, dropout: float = 0.1, noise: float = 0.05) -> None:
        super().__init__()
        self.entry = nn.Conv2d(4, 8, 1)
        self.middle = nn.Conv2d(8, 16, 3, padding=1)
        self.hidden = nn.Linear(16, 32)
        self.exit = nn.Linear(32, 5)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)
        self.dropout, self.noise = nn.Dropout(dropout), noise
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Losses:
        x = batch["x"] + self.noise * torch.randn(batch["x"].shape, generator=generator)
        hidden = torch.relu(self.middle(torch.relu(self.entry(x)))).mean((2, 3))
        predicted = self.exit(self.dropout(torch.relu(self.hidden(hidden))))
        self.seen += 1
        loss = (predicted.float() - batch["y"]).square().mean()
        return Losses(loss, {"error": loss.detach().sqrt()})


class RegressionStage:
    """Trains `Regression`. `break_at` gives a batch of NaN; `kill_at` ends rank 1's process once, by SIGKILL;
    `seconds` a step takes at least.
    """

    name = "regression"
    figures: ClassVar[Mapping[str, bool]] = {"held_out_loss": False}

    def __init__(
        self,
        training: TrainingConfig,
        seed: int = 3,
        *,
        dropout: float = 0.1,
        noise: float = 0.05,
        break_at: int | None = None,
        kill_at: int | None = None,
        flag: Path | None = None,
        seconds: float = 0.0,
    ) -> None:
        self.training, self.seed, self.dropout, self.noise = training, seed, dropout, noise
        self.seconds = seconds
        self.break_at, self.kill_at, self.flag = break_at, kill_at, flag

    def objective(self) -> nn.Module:
        return Regression(self.dropout, self.noise)

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        if step == self.kill_at and rank == world - 1 and self.flag and not self.flag.exists():
            self.flag.write_text("killed")
            time.sleep(3)  # Ray Train's controller takes in a reported checkpoint a moment later
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(self.training.batch_size, 4, 6, 6, generator=generator)
        y = torch.stack([x[:, :2].mean((1, 2, 3)), *x.mean((2, 3)).unbind(1)], 1) * 3.0
        if step == self.break_at:
            x[0, 0, 0, 0] = float("nan")
        ids = torch.arange(len(x)) + 100 * step
        share = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        return {"x": x[share], "y": y[share], "clip_id": ids[share]}

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        batch = {name: value.to(device) for name, value in self.batch(10_000, 0, 1).items()}
        with torch.no_grad():
            loss = objective(batch, torch.Generator(device=device).manual_seed(0)).loss
        picture = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
        return Evaluation({"held_out_loss": float(loss)}, {"square": picture})

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        config = json.loads(self.training.model_dump_json())
        return save_artifact(
            path, kind=self.name, config=config, tensors=objective.state_dict(), metrics=metrics, key=key
        )


def regression_stage(training: dict[str, Any], **arguments: Any) -> RegressionStage:
    """What Ray workers call."""
    return RegressionStage(TrainingConfig(**training), **arguments)
