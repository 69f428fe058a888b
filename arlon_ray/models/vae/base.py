"""What every video VAE does alike: groups of 17 frames, micro-batches, tiles, shift and scale.

A model gives `posterior` and `reconstruct` for one group; `encode` and `decode` take any number of frames and bound
the memory by `vae.group_batch` and `vae.tile`, whatever the clip.

Legend: B batch, G groups, T frames, t latent frames, C latent channels, H×W pixels, h×w = H/8×W/8 latent grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, VaeConfig

SPACE_FACTOR, TIME_FACTOR = 8, 4
#: Share of a tile that its neighbour covers too.
TILE_OVERLAP = 0.25


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


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` frames: 5 a whole group, and one for each 4 frames (or part of 4) of a last part."""
    return frames // GROUP_FRAMES * GROUP_LATENTS + math.ceil(frames % GROUP_FRAMES / TIME_FACTOR)


class VideoVAE(nn.Module, ABC):
    """A video VAE. `encode` and `decode` speak normalised latents (near zero mean, unit deviation)."""

    shift: Tensor
    scale: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self._dtype = torch.float32
        self.register_buffer("shift", torch.zeros(config.latent_channels))
        self.register_buffer("scale", torch.ones(config.latent_channels))

    def in_precision(self, dtype: torch.dtype) -> VideoVAE:
        """With weights and arithmetic in `dtype`. Latents and pixels stay float32, and what normalises them."""
        shift, scale = self.shift, self.scale
        self.to(dtype)
        self.shift, self.scale, self._dtype = shift, scale, dtype
        return self

    @abstractmethod
    def posterior(self, video_B3THW: Tensor) -> Posterior:
        """Posterior of one group of T ≤ 17 frames, pixels in [-1, 1]: ⌈T/4⌉ latents."""

    @abstractmethod
    def reconstruct(self, raw_BCthw: Tensor, frames: int | None = None) -> Tensor:
        """Pixels [B, 3, T, H, W], not clamped, of one group's raw latents; T = `frames`, by default 4·t − 3."""

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.config.latent_channels

    @torch.no_grad()
    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Normalised latents [B, C, t, h, w] (posterior means) of pixels in [-1, 1]; t = `latent_frames(T)`.

        Raises ValueError for a video without frames, or with sides that are not multiples of 8.
        """
        frames, height, width = video_B3THW.shape[2:]
        if not frames or height % SPACE_FACTOR or width % SPACE_FACTOR:
            raise ValueError(
                f"video of {frames} frames, {height}×{width}: expected at least 1 frame, and sides that are "
                f"multiples of {SPACE_FACTOR}; scale or cut the clip"
            )

        def of_group(part: Tensor) -> Tensor:
            return self._in_tiles(lambda tile: self.posterior(tile.to(self._dtype)).mean.float(), part, 1, SPACE_FACTOR)

        raw = self._in_groups(of_group, video_B3THW, GROUP_FRAMES)
        return (raw - self.shift[:, None, None, None]) / self.scale[:, None, None, None]

    @torch.no_grad()
    def decode(self, latents_BCthw: Tensor, frames: int | None = None) -> Tensor:
        """Pixels in [-1, 1], [B, 3, T, H, W], of normalised latents; T = `frames`.

        Without `frames`, t must be 1 or 5·G, which say how many frames they are. Raises ValueError otherwise, or where
        `frames` frames do not have t latents.
        """
        count = latents_BCthw.shape[2]
        if frames is None:
            if count != 1 and (not count or count % GROUP_LATENTS):
                raise ValueError(f"{count} latent frames: expected 1 or a multiple of {GROUP_LATENTS}, or `frames`")
            frames = 1 if count == 1 else count // GROUP_LATENTS * GROUP_FRAMES
        elif frames < 1 or latent_frames(frames) != count:
            raise ValueError(f"{frames} frames have {latent_frames(max(frames, 0))} latent frames, found {count}")
        rest = frames % GROUP_FRAMES

        def of_group(part: Tensor) -> Tensor:
            length = GROUP_FRAMES if part.shape[2] == GROUP_LATENTS else rest
            return self._in_tiles(
                lambda tile: self.reconstruct(tile.to(self._dtype), length).float(), part, SPACE_FACTOR, 1
            )

        raw = latents_BCthw * self.scale[:, None, None, None] + self.shift[:, None, None, None]
        return self._in_groups(of_group, raw, GROUP_LATENTS).clamp_(-1.0, 1.0)

    def _in_groups(self, function: Callable[[Tensor], Tensor], x_BCthw: Tensor, group: int) -> Tensor:
        """`function` of each group of `group` frames, `group_batch` of them at a time, and of the part that is left."""
        batch, _, count = x_BCthw.shape[:3]
        whole, done = count // group * group, []
        if whole:
            groups = rearrange(x_BCthw[:, :, :whole], "b c (g t) h w -> (b g) c t h w", t=group)
            results = _joined([function(part) for part in groups.split(self.config.group_batch)], 0)
            done.append(rearrange(results, "(b g) c t h w -> b c (g t) h w", b=batch))
        if count > whole:
            rest = [function(part) for part in x_BCthw[:, :, whole:].split(self.config.group_batch)]
            done.append(_joined(rest, 0))
        return _joined(done, 2)

    def _in_tiles(self, function: Callable[[Tensor], Tensor], x: Tensor, out: int, into: int) -> Tensor:
        """`function` of `x` [B, C, T, H, W], tile by tile with linear blending; at once if `tile` is 0.

        One latent is `into` × `into` places of `x` and `out` × `out` of the result.
        """
        height, width = x.shape[3] // into, x.shape[4] // into
        rows, columns = (windows(size, self.config.tile // SPACE_FACTOR) for size in (height, width))
        if len(rows) == len(columns) == 1:
            return function(x)
        total: Tensor | None = None
        weights = torch.zeros(height * out, width * out, device=x.device)
        for row in rows:
            for column in columns:
                part = function(x[..., _times(row, into), _times(column, into)])
                weight = _ramp(part.shape[3], x.device)[:, None] * _ramp(part.shape[4], x.device)
                if total is None:
                    total = part.new_zeros(*part.shape[:3], *weights.shape)
                total[..., _times(row, out), _times(column, out)] += part * weight
                weights[_times(row, out), _times(column, out)] += weight
        assert total is not None
        return total.div_(weights)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def windows(size: int, tile: int) -> list[slice]:
    """Equal tiles of length `tile` that cover an axis of length `size`; neighbours share a quarter of a tile or more.

    One window where `tile` is 0 or covers the axis.
    """
    if not tile or size <= tile:
        return [slice(0, size)]
    count = 1 + math.ceil((size - tile) / (tile - math.ceil(tile * TILE_OVERLAP)))
    return [slice(start, start + tile) for start in ((size - tile) * i // (count - 1) for i in range(count))]


def _times(window: slice, factor: int) -> slice:
    return slice(window.start * factor, window.stop * factor)


def _ramp(length: int, device: torch.device) -> Tensor:
    """Weights [length] of a tile, rising over its overlap at either end.

    The outermost third of the overlap, where the model saw zeros instead of the neighbourhood, counts next to nothing:
    only at the edge of the frame, where no other tile lies, is it used.
    """
    at, overlap = torch.arange(length, device=device) + 0.5, max(1.0, length * TILE_OVERLAP)
    return ((torch.minimum(at, length - at) - overlap / 3) / (overlap * 2 / 3)).clamp(1e-4, 1.0)
