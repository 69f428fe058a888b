"""The small video VAE of the tiny preset, behind the interface of the Open-Sora v1.2 VAE.

17-frame groups ↔ 5 latents, 8×8 in space, each group coded on its own [Open-Sora v1.2, `micro_frame_size=17`].
Four frames of 4×4 pixels are folded into channels first, so that the convolutions run on a small grid.

Legend: B batch, G groups, T frames (17·G, or 1), t latent frames (5·G, or 1), C latent channels, H×W pixels,
h×w = H/8×W/8.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import building, load_artifact
from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, VaeConfig

TIME_FOLD, SPACE_FOLD, SPACE_FACTOR = 4, 4, 8


class Posterior(NamedTuple):
    """Diagonal Gaussian over raw (not yet shifted and scaled) latents, both [B, C, t, h, w]."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, [B, C, t, h, w]."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.log_variance).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, mean over all elements (scalar)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance).mean()


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position of [N, C, h, w]: no statistics over time, so causality holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_NChw: Tensor) -> Tensor:
        scale = torch.rsqrt(x_NChw.square().mean(1, keepdim=True) + 1e-6)
        return x_NChw * scale * self.weight[:, None, None]


class SpaceTimeBlock(nn.Module):
    """Residual block: 3×3 in space, then three frames back in time (causal). Frames are folded into the batch."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.space = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Conv2d(3 * channels, channels, 1) if temporal else None
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_NChw: Tensor, frames: int) -> Tensor:
        y = F.silu(self.space(self.norm(x_NChw)))
        if self.time is not None:
            y = F.silu(self.time(_with_past(y, frames)))
        return x_NChw + self.out(y)


def _with_past(x_NChw: Tensor, frames: int) -> Tensor:
    """Stack each frame with the two before it along channels; before the first one there is only the first one."""
    x = rearrange(x_NChw, "(b t) c h w -> b t c h w", t=frames)
    padded = torch.cat([x[:, :1], x[:, :1], x], dim=1)
    stacked = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], dim=2)
    return rearrange(stacked, "b t c h w -> (b t) c h w")


class FoldedVAE(nn.Module):
    """Video VAE on folded frames; `encode` and `decode` speak normalised latents (zero mean, unit deviation)."""

    shift: Tensor
    scale: Tensor
    muon_excluded = ("encode_in", "encode_out", "decode_in", "decode_out")

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        folded = 3 * TIME_FOLD * SPACE_FOLD**2
        width, deep, channels = config.width, config.deep_width, config.latent_channels
        self.encode_in = nn.Conv2d(folded, width, 3, padding=1)
        self.encode_shallow = SpaceTimeBlock(width, temporal=False)
        self.encode_down = nn.Conv2d(width, deep, 2, stride=2)
        self.encode_deep = nn.ModuleList(SpaceTimeBlock(deep, temporal=True) for _ in range(config.blocks))
        self.encode_norm = ChannelNorm(deep)
        self.encode_out = nn.Conv2d(deep, 2 * channels, 1)
        self.decode_in = nn.Conv2d(channels, deep, 3, padding=1)
        self.decode_deep = nn.ModuleList(SpaceTimeBlock(deep, temporal=True) for _ in range(config.blocks))
        self.decode_up = nn.Conv2d(deep, 4 * width, 1)
        self.decode_shallow = nn.ModuleList(SpaceTimeBlock(width, temporal=False) for _ in range(2))
        self.decode_norm = ChannelNorm(width)
        self.decode_out = nn.Conv2d(width, folded, 3, padding=1)
        self.register_buffer("shift", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.config.latent_channels

    def posterior(self, video_B3THW: Tensor) -> Posterior:
        """Posterior of one group: T = 17 (5 latents) or T = 1 (1 latent), pixels in [-1, 1]."""
        frames = video_B3THW.shape[2]
        padding = -frames % TIME_FOLD
        video = torch.cat([video_B3THW[:, :, :1].expand(-1, -1, padding, -1, -1), video_B3THW], dim=2)
        latent_frames = video.shape[2] // TIME_FOLD
        x = rearrange(
            video, "b c (t u) (h p) (w q) -> (b t) (c u p q) h w", u=TIME_FOLD, p=SPACE_FOLD, q=SPACE_FOLD
        ).contiguous(memory_format=torch.channels_last)
        x = self.encode_down(self.encode_shallow(self.encode_in(x), latent_frames))
        for block in self.encode_deep:
            x = block(x, latent_frames)
        moments = rearrange(self.encode_out(self.encode_norm(x)), "(b t) c h w -> b c t h w", t=latent_frames)
        mean, log_variance = moments.float().chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-20.0, 10.0))

    def reconstruct(self, raw_BCthw: Tensor) -> Tensor:
        """Pixels of one group of raw latents: t = 5 gives 17 frames, t = 1 gives 1. Not clamped."""
        latent_frames = raw_BCthw.shape[2]
        x = rearrange(raw_BCthw, "b c t h w -> (b t) c h w").contiguous(memory_format=torch.channels_last)
        x = self.decode_in(x)
        for block in self.decode_deep:
            x = block(x, latent_frames)
        x = F.pixel_shuffle(self.decode_up(x), 2)
        for block in self.decode_shallow:
            x = block(x, latent_frames)
        video = rearrange(
            self.decode_out(F.silu(self.decode_norm(x))),
            "(b t) (c u p q) h w -> b c (t u) (h p) (w q)",
            t=latent_frames,
            u=TIME_FOLD,
            p=SPACE_FOLD,
            q=SPACE_FOLD,
        )
        return video[:, :, TIME_FOLD - 1 :].float()

    @torch.no_grad()
    def encode(self, video_B3THW: Tensor, micro_batch: int = 16) -> Tensor:
        """Normalised latents [B, C, t, h, w] of pixels in [-1, 1], `micro_batch` groups at a time.

        Raises ValueError unless T is 1 or a multiple of 17 and H and W are multiples of 8.
        """
        batch, _, frames, height, width = video_B3THW.shape
        if (frames != 1 and frames % GROUP_FRAMES) or height % SPACE_FACTOR or width % SPACE_FACTOR:
            raise ValueError(
                f"video of {frames} frames, {height}×{width}: expected 1 frame or a multiple of {GROUP_FRAMES}, "
                f"and sides that are multiples of {SPACE_FACTOR}; cut or pad the clip"
            )
        group = min(frames, GROUP_FRAMES)
        groups = rearrange(video_B3THW, "b c (g t) h w -> (b g) c t h w", t=group)
        raw = torch.cat([self.posterior(part).mean for part in groups.split(micro_batch)])
        raw = rearrange(raw, "(b g) c t h w -> b c (g t) h w", b=batch)
        return (raw - self.shift[:, None, None, None]) / self.scale[:, None, None, None]

    @torch.no_grad()
    def decode(self, latents_BCthw: Tensor, micro_batch: int = 16) -> Tensor:
        """Pixels in [-1, 1], [B, 3, T, H, W], of normalised latents. Raises ValueError unless t is 1 or 5·G."""
        batch, _, latent_frames = latents_BCthw.shape[:3]
        if latent_frames != 1 and latent_frames % GROUP_LATENTS:
            raise ValueError(f"{latent_frames} latent frames: expected 1 or a multiple of {GROUP_LATENTS}")
        raw = latents_BCthw * self.scale[:, None, None, None] + self.shift[:, None, None, None]
        groups = rearrange(raw, "b c (g t) h w -> (b g) c t h w", t=min(latent_frames, GROUP_LATENTS))
        video = torch.cat([self.reconstruct(part) for part in groups.split(micro_batch)])
        return rearrange(video, "(b g) c t h w -> b c (g t) h w", b=batch).clamp(-1.0, 1.0)


def load_vae(path: str | Path, device: str | torch.device = "cpu") -> FoldedVAE:
    """The VAE at `path`, frozen, in evaluation mode. Raises ArtifactError."""
    artifact = load_artifact(path, "vae")
    tensors = artifact.tensors(device)
    with building(artifact):
        with torch.device("meta"):
            vae = FoldedVAE(VaeConfig.model_validate(artifact.config))
        vae.load_state_dict(tensors, assign=True)
    return vae.eval().requires_grad_(False)
