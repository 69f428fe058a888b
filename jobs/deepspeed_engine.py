"""The training loop's Engine on DeepSpeed ZeRO. Imported in Ray's workers only: importing DeepSpeed takes seconds."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
from torch import nn

from arlon_ray.config import TrainingConfig, merged
from arlon_ray.training.engine import (
    Clock,
    Losses,
    NonFiniteError,
    Stage,
    autocast,
    build_objective,
    floats,
    mean_values,
    micro_batches,
    parameter_counts,
    to_device,
)
from arlon_ray.training.memory import BUCKET_ELEMENTS
from arlon_ray.training.optimizer import clipped_parameters, muon_update, parameter_groups, set_learning_rates
from arlon_ray.training.sequence import SequenceParallel
from arlon_ray.training.state import Piece, SavedState, buffers, frozen_parts, write_state
from jobs.shared_memory_op import build_shared_memory_op
from jobs.zero_partition import partition_of


class _Autocast(nn.Module):
    """The objective within autocast: DeepSpeed switches off an autocast that it finds around its forward."""

    def __init__(self, objective: nn.Module, training: TrainingConfig, device: torch.device) -> None:
        super().__init__()
        self.objective, self.training_config, self.device = objective, training, device

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        with autocast(self.training_config, self.device):
            return self.objective(batch, generator)


class DeepSpeedEngine:
    """Data-parallel training with ZeRO 0 to 3. Needs an initialised torch.distributed group (Ray Train's)."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.training, self.device = stage.training, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        size = self.training.sequence_parallel
        self.data_rank, self.data_world = self.rank // size, self.world // size
        build_shared_memory_op(device)
        self.objective = build_objective(stage).to(device)
        if size > 1:
            _share_frames(self.objective, size, self.rank, self.world)
        optimizer = _optimizer(parameter_groups(self.objective, self.training))
        self._clipped = clipped_parameters(self.objective)
        self.counts, self.clock = parameter_counts(self.objective), Clock()
        _hide_frozen_parts(self.objective)
        self._engine, *_ = deepspeed.initialize(
            model=_Autocast(self.objective, self.training, device),
            optimizer=optimizer,
            config=settings(self.training, self.world),
            dist_init_required=False,
        )
        if self.training.zero_stage and self.training.optimizer == "muon":
            clip = _clip_adamw_only_3 if self.training.zero_stage == 3 else _clip_adamw_only
            clip(self._engine.optimizer, self.training.clip_norm)
        self._partition = partition_of(self._engine.optimizer, self.objective, self.training.zero_stage, self.rank)

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """See Engine."""
        set_learning_rates(self._engine.optimizer.param_groups, learning_rate_scale)
        parts = micro_batches(to_device(batch, self.device), self.training.accumulation)
        found, norm = [], None
        for number, part in enumerate(parts, start=1):
            with self.clock("forward"):
                losses = self._engine(part, generator)
                found.append(floats(losses))
            with self.clock("backward"):
                self._engine.backward(losses.loss)
            with self.clock("optimizer"):
                if number == len(parts) and not self.training.zero_stage:
                    norm = nn.utils.clip_grad_norm_(self._clipped, self.training.clip_norm)
                self._engine.step()
        values = mean_values(found)
        values["grad_norm"] = float(self._engine.get_global_grad_norm() if norm is None else norm)
        if not math.isfinite(values["grad_norm"]):
            raise NonFiniteError(f"the gradient norm is {values['grad_norm']}")
        return values

    def average(self, metrics: dict[str, float]) -> dict[str, float]:
        """See Engine."""
        names = sorted(metrics)
        values = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        means = dict(zip(names, (values / self.world).tolist(), strict=True))
        return {name: means[name] for name in metrics}

    def parameters(self) -> list[Piece]:
        """See Engine."""
        return self._partition.parameters()

    def save(self, folder: Path, steps: int, more: Sequence[Piece] = ()) -> None:
        """See Engine."""
        first = [] if self.rank else buffers(self.objective)
        pieces = [*self.parameters(), *self._partition.kept(), *first, *more]
        write_state(folder, pieces, steps, self.rank, self.world)

    def load(self, saved: SavedState) -> None:
        """See Engine."""
        saved.fill(buffers(self.objective))
        self._partition.load(saved)


def _share_frames(objective: nn.Module, size: int, rank: int, world: int) -> None:
    """Give the frames of a sample to `size` neighbouring ranks. Raises ValueError if the model cannot be shared."""
    models = [module for module in objective.modules() if hasattr(module, "parallel")]
    if not models:
        raise ValueError(f"sequence_parallel={size}: this stage has no model that shares its frames")
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    for model in models:
        model.parallel = SequenceParallel(groups[rank // size])  # type: ignore[assignment]


def _hide_frozen_parts(objective: nn.Module) -> None:
    """Make frozen parts plain attributes, which DeepSpeed does not see.

    ZeRO 3 would split them too, and wait for all workers where one uses a part that another does not need.
    """
    for name, part in frozen_parts(objective).items():
        delattr(objective, name)
        object.__setattr__(objective, name, part)


def settings(training: TrainingConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, with what `training.deepspeed` adds.

    Parameters stay float32: the forward's bf16 comes from autocast.
    """
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    if training.zero_stage == 3 and training.optimizer == "muon":
        zero["reduce_scatter"] = False  # DeepSpeed asks for it: Muon needs whole gradients
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    # ZeRO's own clipping does for AdamW. Without ZeRO, and with Muon, it is done here (see `_clip_adamw_only`).
    own_clipping = training.zero_stage and training.optimizer == "adamw"
    ours = {
        # of what DeepSpeed takes for data parallelism: all workers
        "train_micro_batch_size_per_gpu": max(1, training.batch_size // world // training.accumulation),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.clip_norm if own_clipping else 0.0,
        "zero_optimization": zero,
        # torch's AdamW where the state lies in main memory too: the same numbers as everywhere else
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return merged(ours, training.deepspeed)


def _optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon with AdamW for the rest.

    DeepSpeed 0.19.8's own `muon_update` fails with convolution weights (it returns the flattened matrix) and compiles
    itself on the first call; the project's function, which is the same for matrices, takes its place.
    """
    if not any(group["use_muon"] for group in groups):
        return torch.optim.AdamW(groups, fused=True)  # one pass over a partition that may be gigabytes
    original_muon.muon_update = muon_update
    muon_optimizer.muon_update = muon_update
    return muon_optimizer.MuonWithAuxAdam(groups)


def _clip_adamw_only(zero: Any, clip_norm: float) -> None:
    """Make ZeRO 1 or 2 clip AdamW's gradients by the norm of AdamW's gradients, and leave Muon's updates alone.

    ZeRO orthogonalises before it clips, so its norm would be that of Muon's updates: far above any sensible limit
    whatever the gradient is, which would scale every step down by a large and changing factor.
    """
    muon = [i for i, group in enumerate(zero.optimizer.param_groups) if group["use_muon"]]
    clip = zero.unscale_and_clip_grads

    def norm_of_adamw(norm_type: int = 2) -> torch.Tensor:
        norms = [
            zero.get_grad_norm_direct(zero.averaged_gradients[i], zero.params_in_partition[i])
            for i in range(len(zero.bit16_groups))
            if i not in muon
        ]
        return torch.stack([torch.as_tensor(norm) for norm in norms]).norm() if norms else torch.zeros(())

    def clip_adamw(gradients: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        if not any(zero.single_partition_of_fp32_groups[i].grad is gradients[0] for i in muon):
            clip(gradients, total_norm)

    zero.clip_grad = clip_norm
    zero.scaled_global_norm = norm_of_adamw
    zero.unscale_and_clip_grads = clip_adamw


def _clip_adamw_only_3(zero: Any, clip_norm: float) -> None:
    """The same for ZeRO 3, whose groups are sub-groups."""
    muon, clip = zero.sub_groups_using_muon, zero.unscale_and_clip_grads

    def norms_of_adamw() -> list[torch.Tensor]:
        return [
            zero.get_grad_norm_direct(zero.averaged_gradients[i], group)
            for i, group in enumerate(zero.fp16_groups)
            if not muon[i]
        ]

    def clip_adamw(sub_group_id: int, total_norm: torch.Tensor) -> None:
        if not muon[sub_group_id]:
            clip(sub_group_id, total_norm)

    zero.clip_grad = clip_norm
    zero._get_norm_groups = norms_of_adamw
    zero.unscale_and_clip_grads = clip_adamw
