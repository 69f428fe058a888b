"""How one stage is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from arlon_ray.config.base import Section

#: What `TrainingConfig.deepspeed` may not say, because other settings do.
OWNED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "torch_autocast",
}  # fmt: skip


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
    accumulation: int = Field(1, ge=1, description="parts in which each worker goes through its share of a batch")
    activation_checkpointing: bool = Field(False, description="blocks are computed again in the backward pass")
    checkpointed_share: float = Field(
        1.0, gt=0, le=1, description="share of the blocks that activation_checkpointing computes again"
    )
    compile: bool = Field(
        False, description="the blocks go through torch.compile: a minute at the start, faster steps behind it"
    )
    sequence_parallel: int = Field(1, ge=1, description="workers that share the frames of a sample; for the DiT")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what DeepSpeed splits over the workers")
    offload_optimizer: bool = Field(False, description="the optimizer's state lies in main memory; needs AdamW, ZeRO")
    deepspeed: dict[str, Any] = Field({}, description="merged into DeepSpeed's own configuration")
    log_every: int = Field(20, ge=1, description="steps")
    checkpoint_every: int = Field(200, ge=1, description="steps")
    evaluate_every: int = Field(
        0, ge=0, description="steps between evaluations on held-out samples, with pictures; 0: at the end alone"
    )
    keep_best: str = Field(
        "", description="held-out figure (loss, …) whose best checkpoint is kept and exported; needs evaluate_every"
    )
    data_share: float = Field(1.0, gt=0, le=1, description="share of the clips that are trained on")
    held_out: int = Field(64, ge=0, description="samples kept out of training and used for the evaluation")

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.offload_optimizer and not self.zero_stage:
            raise ValueError("offload_optimizer=true needs zero_stage 1, 2 or 3")
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError(f"offload_optimizer=true needs optimizer=adamw, not {self.optimizer}")
        if self.compile and (self.zero_stage == 3 or self.sequence_parallel > 1):
            raise ValueError(
                f"compile=true needs zero_stage 0, 1 or 2 and sequence_parallel=1, not {self.zero_stage} and "
                f"{self.sequence_parallel}: a compiled block knows nothing of parts that lie in other workers"
            )
        if self.keep_best and not self.evaluate_every:
            raise ValueError(f"keep_best={self.keep_best} needs evaluate_every, the steps between two evaluations")
        if owned := OWNED.intersection(self.deepspeed):
            raise ValueError(f"deepspeed: {sorted(owned)[0]} comes from the settings beside it; leave it out")
        return self
