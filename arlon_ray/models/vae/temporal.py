"""The temporal VAE of Open-Sora v1.2, with public parameter names: 4× in time, causal, on latents of the spatial VAE.

Legend: B batch, C channels, T frames, t = ⌈T/4⌉ latent frames, h×w latent grid.
"""

from __future__ import annotations

from itertools import pairwise

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.config import TemporalVaeConfig
from arlon_ray.models.vae.base import Posterior


class CausalConv3d(nn.Module):
    """Convolution that sees no later frame: zeros before the first frame, and around each."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=(time_stride, 1, 1), bias=bias)
        around = kernel // 2
        self.padding = (around, around, around, around, kernel - time_stride, 0)

    def forward(self, x_BCThw: Tensor) -> Tensor:
        """[B, C, T, h, w] to [B, C', T or T/2, h, w]: a frame sees itself and those before it."""
        return self.conv(F.pad(x_BCThw, self.padding))


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice; a 1×1×1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = CausalConv3d(inputs, outputs, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = CausalConv3d(outputs, outputs, bias=False)
        if inputs != outputs:
            self.conv3 = CausalConv3d(inputs, outputs, 1, bias=False)

    def forward(self, x_BCThw: Tensor) -> Tensor:
        """[B, C, T, h, w] to [B, C', T, h, w]."""
        y = self.conv1(F.silu(self.norm1(x_BCThw)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv3(x_BCThw) if hasattr(self, "conv3") else x_BCThw)


def _blocks(inputs: int, outputs: int, config: TemporalVaeConfig) -> nn.ModuleList:
    """`num_res_blocks` blocks, the first of which changes the width."""
    widths = [inputs] + [outputs] * config.num_res_blocks
    return nn.ModuleList(ResBlock(before, after, config.num_groups) for before, after in pairwise(widths))


class TemporalEncoder(nn.Module):
    """Frames of spatial latents to moments."""

    def __init__(self, config: TemporalVaeConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = CausalConv3d(config.in_out_channels, config.filters, bias=False)
        befores = [config.filters, *widths[:-1]]
        self.block_res_blocks = nn.ModuleList(
            _blocks(before, width, config) for before, width in zip(befores, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, time_stride=2) if halved else nn.Identity()
            for width, halved in zip(widths[:-1], config.temporal_downsample, strict=True)
        )
        self.res_blocks = _blocks(widths[-1], widths[-1], config)
        self.norm1 = nn.GroupNorm(config.num_groups, widths[-1])
        self.conv2 = CausalConv3d(widths[-1], 2 * config.latent_embed_dim, 1)

    def forward(self, x_BCThw: Tensor) -> Tensor:
        """[B, C, T, h, w], T a multiple of 4, to moments [B, 2·C', T/4, h, w]."""
        x = self.conv_in(x_BCThw)
        for i, blocks in enumerate(self.block_res_blocks):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x)
            if i < len(self.conv_blocks):
                x = self.conv_blocks[i](x)
        for block in self.res_blocks:
            x = block(x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(nn.Module):
    """Latents to frames of spatial latents; level 0 is the last one, as in the encoder."""

    def __init__(self, config: TemporalVaeConfig) -> None:
        super().__init__()
        widths = [config.filters * multiplier for multiplier in config.channel_multipliers]
        self.conv1 = CausalConv3d(config.latent_embed_dim, widths[-1])
        self.res_blocks = _blocks(widths[-1], widths[-1], config)
        befores = [*widths[1:], widths[-1]]
        self.block_res_blocks = nn.ModuleList(
            _blocks(before, width, config) for before, width in zip(befores, widths, strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, 2 * width) if doubled else nn.Identity()
            for width, doubled in zip(widths[1:], config.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(config.num_groups, widths[0])
        self.conv_out = CausalConv3d(widths[0], config.in_out_channels)

    def forward(self, x_BCthw: Tensor) -> Tensor:
        """[B, C', t, h, w] to [B, C, 4·t, h, w]."""
        x = self.conv1(x_BCthw)
        for block in self.res_blocks:
            x = block(x)
        for i in reversed(range(len(self.block_res_blocks))):
            for block in self.block_res_blocks[i]:  # type: ignore[attr-defined]
                x = block(x)
            if i and isinstance(self.conv_blocks[i - 1], CausalConv3d):
                x = rearrange(self.conv_blocks[i - 1](x), "b (c two) t h w -> b c (t two) h w", two=2)
        return self.conv_out(F.silu(self.norm1(x)))


class TemporalVAE(nn.Module):
    """Open-Sora v1.2's `VAE_Temporal`: T frames of spatial latents ↔ ⌈T/4⌉ latents."""

    def __init__(self, config: TemporalVaeConfig) -> None:
        super().__init__()
        self.time_factor = 2 ** sum(config.temporal_downsample)
        self.encoder = TemporalEncoder(config)
        self.quant_conv = CausalConv3d(2 * config.latent_embed_dim, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.latent_embed_dim, 1)
        self.decoder = TemporalDecoder(config)

    def encode(self, x_BCThw: Tensor) -> Posterior:
        """Posterior of any number of frames, padded with zeros in front."""
        padded = F.pad(x_BCThw, (0, 0, 0, 0, -x_BCThw.shape[2] % self.time_factor, 0))
        mean, log_variance = self.quant_conv(self.encoder(padded)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(-30.0, 20.0))

    def decode(self, latents_BCthw: Tensor, frames: int) -> Tensor:
        """`frames` frames [B, C, T, h, w]; what the encoder padded is cut off again."""
        return self.decoder(self.post_quant_conv(latents_BCthw))[:, :, -frames % self.time_factor :]
