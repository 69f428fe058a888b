"""Training of a latent VQ-VAE: reconstruct the DiT's latents through a codebook.

The codebook is learned by vector-quantize-pytorch (moving averages, k-means start, restart of dead codes, sums over all
workers); the model keeps the plain table (van den Oord et al. 2017; Razavi et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import Artifact, save_artifact
from arlon_ray.config import CodecConfig
from arlon_ray.models.codec import LatentCodec
from arlon_ray.training.engine import Evaluation, Losses
from arlon_ray.training.pictures import comparison
from arlon_ray.training.stages.latents import BatchSource, look

#: Training batches over which the use of the codebook is counted.
USAGE_BATCHES = 32


class CodecObjective(nn.Module):
    """Mean squared error of the rebuilt latents (which have unit variance) plus the commitment loss."""

    def __init__(self, config: CodecConfig, latent_channels: int) -> None:
        super().__init__()
        self.codec = LatentCodec(config, latent_channels)
        self.quantizer = None if config.quantizer == "fsq" else _quantizer(config)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Losses:
        """Squared error of the rebuilt latents, and the commitment loss."""
        latents = batch["latents"]
        features = self.codec.features(latents)
        quantized, indices, commitment = self._quantized(features.flatten(1, 3))
        rebuilt = self.codec.rebuild(quantized.view_as(features), len(latents), tuple(latents.shape[3:]))
        error = F.mse_loss(rebuilt, latents)
        used = indices.unique().numel() / len(self.codec.codebook)
        metrics = {
            "relative_error": error.detach() / latents.var(),
            "commitment": commitment.detach().mean(),
            "codebook_used_in_batch": torch.tensor(used),
        }
        return Losses(error + commitment.mean(), metrics, indices.numel())

    def _quantized(self, features_NLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [N, L, D] with a gradient to the features, their numbers [N, L], and the commitment loss."""
        if self.quantizer is None:
            indices = self.codec.nearest(features_NLD)
            codes = self.codec.codebook[indices]
            return features_NLD + (codes - features_NLD).detach(), indices, features_NLD.new_zeros(())
        with torch.autocast(features_NLD.device.type, enabled=False):
            quantized, indices, commitment = self.quantizer(features_NLD)
        self.codec.codebook.copy_(self.quantizer.codebook.detach())
        return quantized, indices, commitment


def _quantizer(config: CodecConfig) -> Any:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(
        dim=config.code_dim,
        codebook_size=config.codebook_size,
        decay=config.ema_decay,
        commitment_weight=config.commitment_weight,
        threshold_ema_dead_code=config.dead_code_threshold,
        kmeans_init=True,
        kmeans_iters=10,
        use_cosine_sim=config.metric == "cosine",
        rotation_trick=config.quantizer == "rotation",
    )


class CodecStage:
    """The stage of the `fine` or the `coarse` codec."""

    figures: ClassVar[Mapping[str, bool]] = {
        "relative_error": False,
        "codebook_used": True,
        "codebook_perplexity": True,
    }

    def __init__(
        self,
        config: CodecConfig,
        role: Literal["fine", "coarse"],
        latent_channels: int,
        source: BatchSource,
        vae_path: Path,
        parents: Mapping[str, str],
        seed: int,
    ) -> None:
        self.name = f"vqvae_{role}"
        self.config, self.latent_channels, self.source = config, latent_channels, source
        self.vae_path, self.parents, self.seed = vae_path, dict(parents), seed
        self.training = config.training

    def objective(self) -> nn.Module:
        """A freshly initialised codec with its loss."""
        return CodecObjective(self.config, self.latent_channels)

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See Stage."""
        return self.source.batch(step, rank, world)

    def evaluate(self, objective: nn.Module, device: torch.device) -> Evaluation:
        """Relative error on held-out clips; share of codes used, and perplexity, over many training batches."""
        codec: LatentCodec = objective.codec  # type: ignore[assignment]
        errors, variances, first = [], [], None
        for batch in self.source.held_out_batches(self.training.batch_size):
            latents = batch["latents"].to(device)
            rebuilt = codec.decode(codec.encode(latents), tuple(latents.shape[3:]))
            errors.append((rebuilt - latents).square().mean())
            variances.append(latents.var())
            first = first or (latents[:6], rebuilt[:6])
        metrics = usage(self._training_tokens(codec, device), self.config.codebook_size)
        pictures = {}
        if first:
            metrics["relative_error"] = float(torch.stack(errors).mean() / torch.stack(variances).mean())
            pictures["rebuilt"] = comparison(*(look(latents, self.vae_path) for latents in first))
        return Evaluation(metrics, pictures)

    def _training_tokens(self, codec: LatentCodec, device: torch.device) -> Tensor:
        batches = (self.source.batch(step, 0, 1) for step in islice(range(self.training.steps), USAGE_BATCHES))
        return torch.cat([codec.encode(batch["latents"].to(device)).flatten() for batch in batches])

    def export(self, objective: nn.Module, path: Path, *, metrics: dict[str, float], key: str) -> Artifact:
        """Write the codec (the quantiser's own bookkeeping stays behind)."""
        codec: LatentCodec = objective.codec  # type: ignore[assignment]
        return save_artifact(
            path,
            kind="codec",
            config={**self.config.model_dump(mode="json"), "latent_channels": self.latent_channels},
            tensors=codec.state_dict(),
            parents=self.parents,
            metrics=metrics,
            key=key,
        )


def usage(tokens: Tensor, codebook_size: int) -> dict[str, float]:
    """Share of codes that occur in `tokens`, and the perplexity exp(entropy) of their distribution."""
    shares = torch.bincount(tokens.flatten().cpu(), minlength=codebook_size).float() / tokens.numel()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"codebook_used": float((shares > 0).float().mean()), "codebook_perplexity": float(entropy.exp())}
