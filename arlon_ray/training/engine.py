"""What the training loop needs of a stage and of an engine, and the engine for one process."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arlon_ray.artifact import Artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.precision import arithmetic
from arlon_ray.training.optimizer import (
    build_optimizers,
    clipped_parameters,
    parameter_groups,
    set_learning_rates,
)
from arlon_ray.training.state import Piece, SavedState, buffers, whole, write_state


@dataclass(frozen=True)
class Losses:
    """What an objective returns: the scalar to minimise, scalar tensors to log (detached), and how long its input was.

    `tokens`: elements of the sequences that the model went through, 0 where it has none. `asked`: over how many of them
    loss and metrics are means, where batches of one size differ in it.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    asked: Tensor | None = None


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out data, and pictures uint8 [H, W, 3]."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Clock:
    """Seconds of the parts of steps since the last `read`. On a GPU what is launched counts where it is waited for."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the block to `part`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """What was counted; begins anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


#: The figure of a step that says how many tokens one of its parts had.
TOKENS = "tokens"


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not a number any more; nothing was stepped with it."""


class Stage(Protocol):
    """One model's training, independent of the engine that runs it."""

    name: str
    training: TrainingConfig
    seed: int
    #: What `evaluate` measures, and whether more of it is better.
    figures: ClassVar[Mapping[str, bool]]

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
    #: Which share of a batch this rank has, and of how many: those of a sequence-parallel group have the same.
    data_rank: int
    data_world: int
    device: torch.device
    objective: nn.Module
    #: Parameters that train, and frozen ones.
    counts: tuple[int, int]
    #: Of "forward", "backward" and "optimizer"; with ZeRO the communication is in the last two.
    clock: Clock

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """Forward and backward of each of `training.accumulation` parts, clip, optimizer step.

        This rank's mean loss and metrics, and the grad_norm of all ranks. Raises NonFiniteError.
        """

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """The mean over the ranks; every rank calls it with the same names."""

    def parameters(self) -> list[Piece]:
        """What this rank has to save of the float32 parameters that train: together with the other ranks', all."""

    def save(self, folder: Path, steps: int, more: Sequence[Piece] = ()) -> None:
        """Write this rank's share of the state after `steps` steps, and `more`, into an existing folder."""

    def load(self, saved: SavedState) -> None:
        """Go on from what `save` wrote, with any number of ranks, of any engine."""


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
    objective, training = stage.objective().train(), stage.training
    if training.compile:
        compile_blocks(objective)
    if training.activation_checkpointing:
        recompute_blocks(objective, training.checkpointed_share)
    return objective


def parameter_counts(objective: nn.Module) -> tuple[int, int]:
    """(parameters that train, frozen parameters)."""
    parameters = list(objective.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return trained, sum(p.numel() for p in parameters) - trained


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks in the lists that models name in `block_lists`."""
    lists = [getattr(part, name) for part in model.modules() for name in getattr(part, "block_lists", ())]
    return [block for each in lists for block in each]


def trained_blocks(objective: nn.Module) -> list[nn.Module]:
    """Those of `blocks_of` that have something to train."""
    return [block for block in blocks_of(objective) if any(p.requires_grad for p in block.parameters())]


def recompute_blocks(objective: nn.Module, share: float = 1.0) -> int:
    """Keep only the inputs of blocks that train and compute the rest again in the backward pass; returns how many.

    `share` of them, evenly spread over the model.
    """
    blocks = trained_blocks(objective)
    chosen = [block for i, block in enumerate(blocks) if math.floor((i + 1) * share) > math.floor(i * share)]
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(chosen)


def compile_blocks(model: nn.Module) -> int:
    """Compile the blocks that train (of a frozen model: all); returns how many. Blocks of one kind share a compilation.

    It happens at the first call, and again for shapes that are new. Before `recompute_blocks`, which goes around it.
    """
    blocks = trained_blocks(model) or blocks_of(model)
    for block in blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    return len(blocks)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`; everything else (clip ids, captions) as it is."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def autocast(training: TrainingConfig, device: torch.device) -> Any:
    """Context of the forward pass: bf16 arithmetic on float32 parameters, or nothing."""
    dtype = arithmetic(training.precision, device)
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def floats(losses: Losses) -> dict[str, float]:
    """Loss, metrics and tokens as numbers. Raises NonFiniteError if the loss is not finite."""
    loss = float(losses.loss.detach())
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss}")
    values = {"loss": loss, **{name: float(value) for name, value in losses.metrics.items()}}
    return values | {TOKENS: float(losses.tokens)} if losses.tokens else values


def micro_batches(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """The batch in `count` equal parts. Raises ValueError if it cannot be split evenly."""
    size = len(next(iter(batch.values())))
    if size % count:
        raise ValueError(f"{size} samples cannot be split evenly into training.accumulation={count} parts")
    share = size // count
    parts = range(0, size, share)
    return [{name: value[first : first + share] for name, value in batch.items()} for first in parts]


def mean_values(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each figure over the parts of a batch."""
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


#: What optimizers keep for each parameter, by `use_muon` of its group.
OPTIMIZER_KEYS = {True: ("momentum_buffer",), False: ("exp_avg", "exp_avg_sq")}


class TorchEngine:
    """Plain PyTorch in one process, on any device."""

    rank, world = 0, 1
    data_rank, data_world = 0, 1

    def __init__(self, stage: Stage, device: str | torch.device = "cpu") -> None:
        self.training, self.device = stage.training, torch.device(device)
        self.objective = build_objective(stage).to(self.device)
        self.optimizers = build_optimizers(parameter_groups(self.objective, self.training))
        self._clipped = clipped_parameters(self.objective)
        self.counts, self.clock = parameter_counts(self.objective), Clock()

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """See Engine."""
        self.objective.zero_grad(set_to_none=True)
        parts = micro_batches(to_device(batch, self.device), self.training.accumulation)
        found = []
        for part in parts:
            with self.clock("forward"), autocast(self.training, self.device):
                losses = self.objective(part, generator)
                found.append(floats(losses))
            with self.clock("backward"):
                (losses.loss / len(parts)).backward()
        values = mean_values(found)
        with self.clock("optimizer"):
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

    def parameters(self) -> list[Piece]:
        """See Engine."""
        return whole_parameters(self.objective)

    def save(self, folder: Path, steps: int, more: Sequence[Piece] = ()) -> None:
        """See Engine."""
        kept = whole_optimizer_state(self.objective, self.optimizers)
        write_state(folder, [*self.parameters(), *kept, *buffers(self.objective), *more], steps)

    def load(self, saved: SavedState) -> None:
        """See Engine."""
        load_whole(saved, self.objective, self.optimizers)


def whole_parameters(objective: nn.Module) -> list[Piece]:
    """All that trains, unpartitioned."""
    return [whole(name, "parameter", value) for name, value in objective.named_parameters() if value.requires_grad]


def whole_optimizer_state(objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[Piece]:
    """What optimizers of unpartitioned parameters keep; nothing for a parameter that never had a gradient."""
    names = {parameter: name for name, parameter in objective.named_parameters()}
    return [
        whole(names[parameter], key, state[key])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (state := optimizer.state.get(parameter))
        for key in OPTIMIZER_KEYS[group["use_muon"]]
    ]


@torch.no_grad()
def load_whole(saved: SavedState, objective: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a saved state into unpartitioned parameters and their optimizers. Raises KeyError if it does not fit."""
    saved.fill([*whole_parameters(objective), *buffers(objective)])
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            keys = OPTIMIZER_KEYS[group["use_muon"]]
            for parameter in group["params"]:
                if saved.has(names[parameter], keys[0]):
                    prepare_state(optimizer, parameter, keys, saved.steps)
    saved.fill(whole_optimizer_state(objective, optimizers))


def prepare_state(optimizer: torch.optim.Optimizer, parameter: Tensor, keys: Sequence[str], steps: int) -> None:
    """The state that an optimizer has for a parameter after `steps` steps, its tensors still to be filled."""
    state = optimizer.state[parameter]
    for key in keys:
        state[key] = torch.zeros_like(parameter, requires_grad=False)
    if "exp_avg" in keys:
        # torch's fused AdamW counts in a tensor beside the parameter, DeepSpeed's Muon with AdamW in a number
        counted = torch.tensor(float(steps), device=parameter.device)
        state["step"] = counted if isinstance(optimizer, torch.optim.AdamW) else steps
