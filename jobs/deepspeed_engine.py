"""The training loop's Engine on DeepSpeed ZeRO. Imported in Ray's workers only: importing DeepSpeed takes seconds."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon
from torch import nn

from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import Losses, NonFiniteError, Stage, autocast, build_objective, floats, to_device
from arlon_ray.training.loop import TrainingError
from arlon_ray.training.optimizer import clipped_parameters, muon_update, parameter_groups, set_learning_rates

TAG = "engine"
#: Elements of one reduction: DeepSpeed's own default reserves 2 GB in every worker.
BUCKET_ELEMENTS = 20_000_000


class _Autocast(nn.Module):
    """The objective within autocast: DeepSpeed switches off an autocast that it finds around its forward."""

    def __init__(self, objective: nn.Module, training: TrainingConfig, device: torch.device) -> None:
        super().__init__()
        self.objective, self.training_config, self.device = objective, training, device

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        with autocast(self.training_config, self.device):
            return self.objective(batch, generator)


class DeepSpeedEngine:
    """Data-parallel training with ZeRO 0, 1 or 2. Needs an initialised torch.distributed group (Ray Train's)."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.training, self.device = stage.training, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.objective = build_objective(stage).to(device)
        optimizer = _optimizer(parameter_groups(self.objective, self.training))
        self._clipped = clipped_parameters(self.objective)
        self._engine, *_ = deepspeed.initialize(
            model=_Autocast(self.objective, self.training, device),
            optimizer=optimizer,
            config=_settings(self.training, self.world),
            dist_init_required=False,
        )
        if self.training.zero_stage and self.training.optimizer == "muon":
            _clip_adamw_only(self._engine.optimizer, self.training.clip_norm)

    def step(self, batch: dict[str, Any], generator: torch.Generator, learning_rate_scale: float) -> dict[str, float]:
        """See Engine."""
        losses = self._engine(to_device(batch, self.device), generator)
        values = floats(losses)
        set_learning_rates(self._engine.optimizer.param_groups, learning_rate_scale)
        self._engine.backward(losses.loss)
        norm: Any = None
        if not self.training.zero_stage:
            norm = nn.utils.clip_grad_norm_(self._clipped, self.training.clip_norm)
        self._engine.step()
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

    def save(self, folder: Path) -> None:
        """See Engine. Every rank writes its own partition of the optimizer state."""
        self._engine.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        """See Engine. Raises TrainingError: what DeepSpeed has half loaded must not be trained on."""
        # Frozen parts are not in the checkpoint, hence not strict; the key of the checkpoint vouches for the rest.
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
        except Exception as error:
            raise TrainingError(f"the checkpoint {folder} is damaged: {error}; remove it and run again") from None
        if path is None:
            raise TrainingError(f"no DeepSpeed checkpoint in {folder}; remove it and run again")


def _settings(training: TrainingConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Parameters stay float32: the forward's bf16 comes from autocast."""
    zero = {
        "stage": training.zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    # ZeRO's own clipping does for AdamW. Without ZeRO, and with Muon, it is done here (see _clip_adamw_only).
    own_clipping = training.zero_stage and training.optimizer == "adamw"
    return {
        "train_micro_batch_size_per_gpu": training.batch_size // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.clip_norm if own_clipping else 0.0,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, or DeepSpeed's Muon with AdamW for the rest.

    DeepSpeed 0.19.8's own `muon_update` fails with convolution weights (it returns the flattened matrix) and compiles
    itself on the first call; the project's function, which is the same for matrices, takes its place.
    """
    if not any(group["use_muon"] for group in groups):
        return torch.optim.AdamW(groups)
    original_muon.muon_update = muon_update
    muon_optimizer.muon_update = muon_update
    return muon_optimizer.MuonWithAuxAdam(groups)


def _clip_adamw_only(zero: Any, clip_norm: float) -> None:
    """Make ZeRO 1 and 2 clip AdamW's gradients by the norm of AdamW's gradients, and leave Muon's updates alone.

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
