"""What the training loop needs of a stage and of an engine, and the engine for one process."""

from __future__ import annotations

import hashlib
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from arlon_ray.artifact import Artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.precision import arithmetic
from arlon_ray.training.optimizer import (
    build_optimizers,
    clipped_parameters,
    parameter_groups,
    set_learning_rates,
)

STATE_FILE = "engine.pt"


@dataclass(frozen=True)
class Losses:
    """What an objective returns: the scalar to minimise, and scalar tensors to log (detached)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out data, and pictures uint8 [H, W, 3]."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not a number any more; nothing was stepped with it."""


class Stage(Protocol):
    """One model's training, independent of the engine that runs it."""

    name: str
    training: TrainingConfig
    seed: int

    def objective(self) -> nn.Module:
        """The module to train: forward(batch, generator) -> Losses; frozen parts have requires_grad False."""

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """This rank's share of the batch of `step`: a pure function that leaves global random states alone."""

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        """Measure on held-out data; on rank 0 only, in eval mode, with averaged weights where they are on."""

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        """Write the artefact; on rank 0 only, with averaged weights where they are on."""


class Engine(Protocol):
    """Steps an objective and keeps its state. `objective` is the module itself, not a wrapper."""

    rank: int
    world: int
    device: torch.device
    objective: nn.Module

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """Forward, backward, clip, optimizer step. This rank's loss and metrics, and the grad_norm of all ranks.

        Raises NonFiniteError.
        """

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """The mean over the ranks; every rank calls it with the same names."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of the state into an existing folder."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""


def derived_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on all parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def seed_everything(*parts: object) -> None:
    """Seed the global random states (dropout, dead-code restarts) from `parts`."""
    seed = derived_seed("global", *parts)
    torch.manual_seed(seed)
    random.seed(seed)


def build_objective(stage: Stage) -> nn.Module:
    """The stage's objective with the same initial weights on every rank and in every engine."""
    seed_everything(stage.seed, stage.name, "init")
    return stage.objective().train()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; everything else (clip ids, captions) as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def autocast(training: TrainingConfig, device: torch.device) -> Any:
    """Context of the forward pass: bf16 arithmetic on float32 parameters, or nothing."""
    dtype = arithmetic(training.precision, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def floats(losses: Losses) -> dict[str, float]:
    """Loss and metrics as numbers. Raises NonFiniteError if the loss is not finite."""
    loss = float(losses.loss.detach())
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}")
    return {"loss": loss, **{name: float(value) for name, value in losses.metrics.items()}}


class TorchEngine:
    """Plain PyTorch in one process, on any device."""

    rank, world = 0, 1

    def __init__(self, stage: Stage, device: str | torch.device = "cpu") -> None:
        self.training, self.device = stage.training, torch.device(device)
        self.objective = build_objective(stage).to(self.device)
        self.optimizers = build_optimizers(parameter_groups(self.objective, self.training))
        self._clipped = clipped_parameters(self.objective)

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """See Engine."""
        with autocast(self.training, self.device):
            losses = self.objective(to_device(batch, self.device), generator)
        values = floats(losses)
        self.objective.zero_grad(set_to_none=True)
        losses.loss.backward()
        values["grad_norm"] = float(nn.utils.clip_grad_norm_(self._clipped, self.training.clip_norm))
        if not math.isfinite(values["grad_norm"]):
            raise NonFiniteError(f"the gradient norm is {values['grad_norm']}")
        for optimizer in self.optimizers:
            set_learning_rates(optimizer.param_groups, learning_rate_scale)
            optimizer.step()
        return values

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """See Engine: one process is its own mean."""
        return dict(metrics)

    def save(self, folder: Path) -> None:
        """See Engine."""
        state = {"objective": trained_state(self.objective), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """See Engine."""
        state = torch.load(folder / STATE_FILE, map_location=self.device, weights_only=True)
        load_trained_state(self.objective, state["objective"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def trained_state(objective: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and buffers. Frozen parts come from their own artefacts."""
    frozen = {name for name, p in objective.named_parameters() if not p.requires_grad}
    return {name: value for name, value in objective.state_dict().items() if name not in frozen}


def load_trained_state(objective: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` gave. Raises KeyError where names differ."""
    expected = set(trained_state(objective))
    if different := expected.symmetric_difference(state):
        raise KeyError(f"the checkpoint does not fit the model: {', '.join(sorted(different)[:5])}")
    objective.load_state_dict(state, strict=False)
