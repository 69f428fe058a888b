"""Gates between the stages: what the next stage needs must have survived the one before.

Shapes must survive the VAE, and motion the fine codec, before AR or DiT can show anything (docs/tiny.md). Measured on
rendered scenes that no training has seen, read off their pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from arlon_ray.config import Config
from arlon_ray.evaluation.metrics import meaning
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.evaluation.world import Shot
from arlon_ray.generation import default_options
from arlon_ray.generation.sampling import sample_tokens
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.text import TextEncoder
from arlon_ray.models.vae import VideoVAE, to_frames, to_video
from arlon_ray.training.loop import TrainingError


class GateError(TrainingError):
    """A stage lost what the next one needs. One line that says what, how much of it, and what to do."""


def survival(shots: Sequence[tuple[Shot, Frames]], through: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Share of shots whose shapes, colours and directions are still read after video → `through` → video.

    `through` takes and returns a video [1, 3, T, H, W] in [−1, 1].
    """
    read = [meaning(to_frames(through(to_video(frames[None])))[0], shot) for shot, frames in shots]
    return _shares(read)


@torch.no_grad()
def through_vae(vae: VideoVAE, codec: LatentCodec | None = None) -> Callable[[Tensor], Tensor]:
    """Encode and decode, with a codec between if there is one."""

    def through(video: Tensor) -> Tensor:
        latents = vae.encode(video)
        if codec is not None:
            latents = codec.decode(codec.encode(latents), (latents.shape[3], latents.shape[4]))
        return vae.decode(latents)

    return through


@torch.no_grad()
def plan_survival(
    pairs: Sequence[tuple[str, Shot]],
    vae: VideoVAE,
    codec: LatentCodec,
    ar: ArTransformer,
    text: TextEncoder,
    config: Config,
) -> dict[str, float]:
    """As `survival`, of what the AR plans for captions, decoded by codec and VAE alone."""
    options, size = default_options(config.sampling), config.latent_grid
    grid = codec.grid(config.segment.latents, *size)
    read = []
    for number, (caption, shot) in enumerate(pairs):
        generator, start = torch.Generator().manual_seed(number), torch.zeros(0, *grid[1:], dtype=torch.long)
        tokens = sample_tokens(ar, *text.encode([caption]), start, grid, options, generator)
        read.append(meaning(to_frames(vae.decode(codec.decode(tokens[None], size)))[0], shot))
    return _shares(read)


def _shares(read: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([values[name] for values in read])) for name in ("object_class", "colour", "direction")}


def check_gate(stage: str, found: dict[str, float], needed: dict[str, float], advice: str) -> None:
    """Raises GateError if a share is below what is needed."""
    low = {name: share for name, share in needed.items() if found[name] < share}
    if low:
        told = ", ".join(f"{name} {found[name]:.0%} (needed: {share:.0%})" for name, share in low.items())
        raise GateError(f"{stage}: too little survives for the next stage to learn from: {told}; {advice}")
