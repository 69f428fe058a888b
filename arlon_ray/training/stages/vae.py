"""Training of the small video VAE: reconstruction that stresses what stands out, and a light KL term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from arlon_ray.artifact import Artifact, save_artifact
from arlon_ray.config import VaeConfig
from arlon_ray.models.vae import FoldedVAE, to_frames, to_video
from arlon_ray.training.engine import Evaluation, Losses
from arlon_ray.training.pictures import comparison

BatchFunction = Callable[[int], Tensor]


class GroupSource(Protocol):
    """Where 17-frame groups of pixels come from."""

    def training(self, seed: int, count: int) -> np.ndarray:
        """`count` groups drawn with `seed`: uint8 [count, 17, H, W, 3]."""

    def held_out(self, count: int) -> np.ndarray:
        """Groups that training never sees: uint8 [count, 17, H, W, 3]."""


def detail(video_B3THW: Tensor) -> Tensor:
    """How far each pixel is from its frame's median colour, 0 to 1, [B, 1, T, H, W]: objects stand out."""
    median = video_B3THW.flatten(3).median(dim=3).values[..., None, None]
    return (video_B3THW - median).abs().sum(1, keepdim=True).clamp(max=1.0)


class VaeObjective(nn.Module):
    """L1 + 2·MSE, weighted by 1 + w·detail, plus the KL term."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = FoldedVAE(config)

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator) -> Losses:
        """Loss of one batch of groups {"video": [B, 3, 17, H, W]}."""
        video = batch["video"]
        posterior = self.vae.posterior(video)
        error = self.vae.reconstruct(posterior.sample(generator)) - video
        weight = 1.0 + self.config.detail_weight * detail(video)
        reconstruction = (weight * (error.abs() + 2.0 * error.square())).mean()
        kl = posterior.kl()
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach(), "mse": error.square().mean().detach()}
        return Losses(reconstruction + self.config.kl_weight * kl, metrics)


class VaeStage:
    """The VAE stage; `source` gives pixels."""

    name = "vae"
    figures: ClassVar[Mapping[str, bool]] = {"psnr": True, "psnr_detail": True}

    def __init__(self, config: VaeConfig, source: GroupSource, seed: int) -> None:
        self.config, self.source, self.seed = config, source, seed
        self.training = config.training

    def objective(self) -> nn.Module:
        """A freshly initialised VAE with its loss."""
        return VaeObjective(self.config)

    def batch(self, step: int, rank: int, world: int) -> dict[str, Tensor]:
        """This worker's share of the batch of `step`: {"video": [B, 3, 17, H, W]}."""
        count = self.training.batch_size // world
        return {"video": to_video(self.source.training((self.seed * 1_000_003 + step) * world + rank, count))}

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        """PSNR on held-out groups, over all pixels and over those that stand out, and a before/after picture.

        Empty where nothing is held out.
        """
        vae: FoldedVAE = objective.vae  # type: ignore[assignment]
        frames = self.source.held_out(self.training.held_out)
        if not len(frames):
            return Evaluation()
        video = to_video(frames).to(device)
        with torch.no_grad():
            rebuilt = torch.cat([vae.reconstruct(vae.posterior(v).mean).clamp(-1, 1) for v in video.split(16)])
        error = (rebuilt - video).square().mean(1, keepdim=True)
        salient = detail(video) > 0.5
        metrics = {
            "psnr": _psnr(error.mean((1, 2, 3, 4))),
            "psnr_detail": _psnr((error * salient).sum((1, 2, 3, 4)) / salient.sum((1, 2, 3, 4)).clamp(min=1)),
        }
        return Evaluation(metrics, {"reconstruction": comparison(frames[:6], to_frames(rebuilt[:6]))})

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        """Measure shift and scale of the latents, then write the VAE in half precision."""
        vae: FoldedVAE = objective.vae  # type: ignore[assignment]
        device = vae.shift.device
        with torch.no_grad():
            raw = torch.cat(
                [vae.posterior(to_video(self.source.training(2**40 + i, 32)).to(device)).mean.cpu() for i in range(16)]
            )
        vae.shift.copy_(raw.mean((0, 2, 3, 4)))
        vae.scale.copy_(raw.std((0, 2, 3, 4)))
        config = self.config.model_copy(update={"init": None, "train": False})
        return save_artifact(
            path,
            kind="vae",
            config=config.model_dump(mode="json"),
            tensors=vae.state_dict(),
            metrics=metrics,
            key=key,
            dtype=torch.float16,
        )


def _psnr(mse_per_clip: Tensor) -> float:
    """Mean PSNR in dB of clips in [-1, 1] (peak 2)."""
    return float((10.0 * torch.log10(4.0 / mse_per_clip.clamp(min=1e-10))).mean())
