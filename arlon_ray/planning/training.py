"""What one training step of a stage computes, keeps on disk, and sends between its workers.

Legend: P parameters that train, W workers, A micro-batches of a step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn

from arlon_ray.config import Config
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.vae import build_vae
from arlon_ray.planning.counts import (
    TRAINING,
    Work,
    ar_forward,
    codec_group,
    dit_condition,
    dit_forward,
    dit_grid,
    vae_group,
)
from arlon_ray.training.engine import parameter_counts
from arlon_ray.training.memory import training_of
from arlon_ray.training.optimizer import NEWTON_SCHULZ_STEPS, parameter_groups

FLOAT = 4
#: Checkpoints that a run keeps (`training.checkpoints`).
KEPT = 2
#: Numbers that AdamW reads and writes for a parameter: it, its gradient, two moments.
ADAMW_TRAFFIC = 7


def stage_model(config: Config, stage: str) -> nn.Module:
    """The model that `stage` trains, without weights (on the meta device)."""
    with torch.device("meta"):
        return _BUILD[stage](config)


_BUILD = {
    "vae": lambda config: build_vae(config.vae),
    "vqvae_fine": lambda config: LatentCodec(config.vqvae.fine, config.vae.latent_channels),
    "vqvae_coarse": lambda config: LatentCodec(config.vqvae.coarse, config.vae.latent_channels),
    "ar": lambda config: ArTransformer(
        config.ar,
        codebook_size=config.vqvae.fine.codebook_size,
        text_dim=config.text.dim,
        max_text=config.text.max_tokens,
    ),
    "dit": lambda config: STDiT3(config.dit),
}


def clip_groups(config: Config, stage: str) -> int:
    """17-frame groups of a sample: the longest clips, as far as the stage looks at them."""
    longest = max(config.data.bucket_groups)
    if stage == "vae":
        return 1
    if stage == "ar":
        return min(config.ar_window_groups, longest)
    return min(config.segment.groups, longest) if stage == "dit" else longest


def sample_work(config: Config, stage: str, text: int | None = None) -> Work:
    """Forward and backward of one sample; `text`: tokens of its caption (default: as many as there may be)."""
    groups, length = clip_groups(config, stage), config.text.max_tokens if text is None else text
    if stage == "vae":
        return (vae_group(config, encode=True) + vae_group(config, encode=False)) * TRAINING
    if stage == "ar":
        return ar_forward(config, groups, length) * TRAINING
    if stage == "dit":
        grid = dit_grid(config, groups + config.dit.anchor_groups)
        forward = dit_forward(config.dit, *grid, length, 1)
        made = forward if config.dit.recycled_probability else Work()  # without gradients
        return (forward + dit_condition(config.dit, *grid, length, 1)) * TRAINING + made
    role = stage.removeprefix("vqvae_")
    return (codec_group(config, role, True) + codec_group(config, role, False)) * (TRAINING * groups)


def batch_work(config: Config, stage: str, samples: int, text: int | None = None) -> Work:
    """Forward and backward of so many samples that go through the layers together."""
    work = sample_work(config, stage, text)
    return replace(work * samples, calls=work.calls)


def guide_work(config: Config) -> Work:
    """What the frozen codecs decode for one sample of the DiT."""
    if not config.dit.injection.enabled:
        return Work()
    share = config.dit.coarse_probability
    guide = codec_group(config, "fine", False) * (1 - share) + codec_group(config, "coarse", False) * share
    return guide * clip_groups(config, "dit")


def optimizer_work(config: Config, stage: str) -> Work:
    """A step of the optimizer: AdamW moves numbers, Muon multiplies matrices (Newton–Schulz, `training.optimizer`)."""
    return _optimizer_work(config.model_dump_json(), stage)


@lru_cache(maxsize=64)
def _optimizer_work(settings: str, stage: str) -> Work:
    config = Config.model_validate_json(settings)
    work = Work()
    for group in parameter_groups(stage_model(config, stage), training_of(config, stage)):
        for parameter in group["params"]:
            work += Work(traffic=ADAMW_TRAFFIC * parameter.numel(), calls=group["use_muon"])
            if group["use_muon"]:
                work += Work(products=newton_schulz(len(parameter), parameter.numel() // len(parameter)))
    return work


def newton_schulz(rows: int, columns: int) -> float:
    """Operations of Muon's orthogonalisation of a matrix."""
    few, many = sorted((rows, columns))
    if few == many:
        return 3 * NEWTON_SCHULZ_STEPS * 2 * few**3
    # four products with the matrix itself, fourteen of its small Gram matrix
    return 4 * 2 * few**2 * many + 14 * 2 * few**3


def parameters(config: Config, stage: str) -> tuple[int, int]:
    """Parameters of the stage's model that train, and frozen ones."""
    return parameter_counts(stage_model(config, stage))


def checkpoint_bytes(config: Config, stage: str) -> int:
    """One checkpoint: float32 parameters, the optimizer's state, and the averaged weights, of all workers together."""
    training = training_of(config, stage)
    states, trained = 0, 0
    for group in parameter_groups(stage_model(config, stage), training):
        count = sum(parameter.numel() for parameter in group["params"])
        trained += count
        states += count * (1 if group["use_muon"] else 2)
    return (trained + states + (trained if training.ema_decay else 0)) * FLOAT


def sent_bytes(trained: int, workers: int, zero_stage: int, micro_batches: int = 1) -> float:
    """What a worker sends in one step (ZeRO, Rajbhandari et al. 2020, section 7), float32, in rings of W workers.

    A reduce-scatter or an all-gather of P numbers sends (W − 1)/W·P. Stages 0 and 1 reduce and gather once; stage 2
    reduces every micro-batch; stage 3 gathers parameters for every forward and every backward too.
    """
    passes = {0: 2, 1: 2, 2: 1 + micro_batches, 3: 3 * micro_batches}[zero_stage]
    return passes * (workers - 1) / workers * trained * FLOAT
