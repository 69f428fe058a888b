"""A small seeded source of latents, text and tokens with structure to learn: stages are tested without a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from arlon_ray.config import Config


class ToySource:
    """Latents drawn around one of a few prototypes; text and tokens say which."""

    def __init__(self, config: Config, batch_size: int, groups: int = 2) -> None:
        self.config, self.batch_size, self.frames = config, batch_size, 5 * groups
        generator = torch.Generator().manual_seed(1)
        height, width = config.latent_grid
        channels = config.vae.latent_channels
        self.prototypes = torch.randn(4, channels, self.frames, height, width, generator=generator)
        self.texts = torch.randn(4, 6, config.text.dim, generator=generator)

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See BatchSource."""
        return self._draw(step * world + rank, self.batch_size // world)

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """See BatchSource."""
        yield self._draw(10**6, 4)

    def _draw(self, seed: int, count: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        kind = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(count, *self.prototypes.shape[1:], generator=generator)
        tokens = {}
        for name in ("fine", "coarse"):
            codec = getattr(self.config.vqvae, name)
            sizes = (self.frames, *self.config.latent_grid)
            grid = [size // patch for size, patch in zip(sizes, codec.patch, strict=True)]
            ramp = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
            tokens[f"tokens_{name}"] = (kind.view(-1, 1, 1, 1) * 5 + ramp) % codec.codebook_size
        mask = torch.ones(count, 6, dtype=torch.bool)
        mask[:, 5] = kind > 1
        return {
            "latents": self.prototypes[kind] + 0.1 * noise,
            "text": self.texts[kind] * mask[..., None],
            "text_mask": mask,
            "fps": torch.full((count,), self.config.video.fps),
            "clip_id": torch.arange(count),
            "caption": [str(int(k)) for k in kind],
            **tokens,
        }
