"""How one stage is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from arlon_ray.config.base import Section


class TrainingConfig(Section):
    """Optimizer, schedule, precision and bookkeeping of one training stage."""

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(24, ge=1, description="samples of one step over all workers together")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: matrices of the blocks; the rest AdamW")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW")
    muon_learning_rate: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.0, ge=0, lt=1, description="0 switches the moving average of the weights off")
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    log_every: int = Field(20, ge=1, description="steps")
    checkpoint_every: int = Field(200, ge=1, description="steps")
    data_share: float = Field(1.0, gt=0, le=1, description="share of the clips that are trained on")
    held_out: int = Field(64, ge=0, description="samples kept out of training and used for the evaluation")
