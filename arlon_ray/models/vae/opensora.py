"""The video VAE of Open-Sora v1.2: SDXL's spatial `AutoencoderKL` (diffusers), then the temporal VAE.

Legend: B batch, T frames, t latent frames, H×W pixels, h×w = H/8×W/8.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from arlon_ray.config import VaeConfig
from arlon_ray.models.vae.base import Posterior, VideoVAE
from arlon_ray.models.vae.temporal import TemporalVAE


class OpenSoraVAE(VideoVAE):
    """Spatial and temporal VAE; the spatial one takes `vae.spatial.frame_batch` frames at a time."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        spatial, levels = config.spatial, len(config.spatial.block_out_channels)
        self.spatial: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=spatial.block_out_channels,
            layers_per_block=spatial.layers_per_block,
            latent_channels=spatial.latent_channels,
            norm_num_groups=spatial.norm_num_groups,
        )
        self.temporal = TemporalVAE(config.temporal)

    def posterior(self, video_B3THW: Tensor) -> Posterior:
        """See VideoVAE. Open-Sora draws from the spatial posterior; its mean gives the same clip the same latents."""
        frames = rearrange(video_B3THW, "b c t h w -> (b t) c h w")
        coded = torch.cat([self.spatial.encode(part).latent_dist.mode() for part in self._few(frames)])
        scaled = rearrange(coded * self.config.spatial.scaling, "(b t) c h w -> b c t h w", b=len(video_B3THW))
        return self.temporal.encode(scaled)

    def reconstruct(self, raw_BCthw: Tensor, frames: int | None = None) -> Tensor:
        """See VideoVAE."""
        count = 4 * raw_BCthw.shape[2] - 3 if frames is None else frames
        coded = self.temporal.decode(raw_BCthw, count) / self.config.spatial.scaling
        parts = self._few(rearrange(coded, "b c t h w -> (b t) c h w"))
        video = torch.cat([self.spatial.decode(part).sample for part in parts])
        return rearrange(video, "(b t) c h w -> b c t h w", b=len(raw_BCthw)).float()

    def _few(self, frames: Tensor) -> tuple[Tensor, ...]:
        return frames.split(self.config.spatial.frame_batch)
