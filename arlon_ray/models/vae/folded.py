"""The small video VAE of the tiny preset, behind the interface of the Open-Sora v1.2 VAE.

17-frame groups ↔ 5 latents, 8×8 in space, each group coded on its own [Open-Sora v1.2, `micro_frame_size=17`].
Four frames of 4×4 pixels are folded into channels first, so that the convolutions run on a small grid.

Legend: B batch, G groups, T frames (17·G, or 1), t latent frames (5·G, or 1), C latent channels, H×W pixels,
h×w = H/8×W/8.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.config import VaeConfig
from arlon_ray.models.vae.base import TIME_FACTOR, Posterior, VideoVAE

TIME_FOLD, SPACE_FOLD = TIME_FACTOR, 4


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each position of [N, C, h, w]: no statistics over time, so causality holds."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x_NChw: Tensor) -> Tensor:
        """[N, C, h, w] to the same."""
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
        """[B·T, C, h, w] to the same, T = `frames`."""
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


class FoldedVAE(VideoVAE):
    """Video VAE on folded frames."""

    muon_excluded = ("encode_in", "encode_out", "decode_in", "decode_out")
    block_lists = ("encode_deep", "decode_deep", "decode_shallow")

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
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

    def posterior(self, video_B3THW: Tensor) -> Posterior:
        """See VideoVAE. The first frame is repeated in front until four frames make a latent."""
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

    def reconstruct(self, raw_BCthw: Tensor, frames: int | None = None) -> Tensor:
        """See VideoVAE."""
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
        padding = TIME_FOLD - 1 if frames is None else TIME_FOLD * latent_frames - frames
        return video[:, :, padding:].float()
