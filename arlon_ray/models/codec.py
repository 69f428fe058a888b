"""The latent VQ-VAE: compresses the DiT's latent space into tokens, and decodes tokens to a coarse latent.

ARLON's bridge between AR and DiT. It works group by group (5 latents): no receptive field across groups, so the
tokens of a group never depend on frames that do not exist yet. The model holds the codebook as a plain table; how it is
learned (moving averages, restarts) is the training stage's concern.

Legend: B batch, G groups, C latent channels, t×h×w latent grid (t = 5·G), t'×h'×w' token grid, K codes of D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import building, load_artifact
from arlon_ray.config import GROUP_LATENTS, CodecConfig


class GroupBlock(nn.Module):
    """Residual convolutions within one group; with a kernel of 1 each token sees its own patch alone."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.conv1 = nn.Conv3d(width, width, kernel, padding=kernel // 2)
        self.conv2 = nn.Conv3d(width, width, kernel, padding=kernel // 2)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x_NEthw: Tensor) -> Tensor:
        """[N, E, t, h, w] to the same."""
        # normed over the channels of each place: statistics over the group would tie all its tokens together
        normed = x_NEthw * torch.rsqrt(x_NEthw.square().mean(1, keepdim=True) + 1e-6) * self.scale.view(-1, 1, 1, 1)
        return x_NEthw + self.conv2(F.silu(self.conv1(F.silu(normed))))


class LatentCodec(nn.Module):
    """Encoder, codebook, decoder. `encode` and `decode` are the interface; `features` and `rebuild` serve training."""

    codebook: Tensor
    block_lists = ("encoder", "decoder")

    def __init__(self, config: CodecConfig, latent_channels: int) -> None:
        super().__init__()
        self.config, self.latent_channels = config, latent_channels
        width, patch = config.width, config.patch
        folded = latent_channels * patch[0] * patch[1] * patch[2]
        self.fold_in = nn.Conv3d(folded, width, 1)
        self.encoder = nn.ModuleList(GroupBlock(width, config.encoder_kernel) for _ in range(config.blocks))
        self.to_code = nn.Conv3d(width, config.code_dim, 1)
        self.from_code = nn.Conv3d(config.code_dim, width, 1)
        self.decoder = nn.ModuleList(GroupBlock(width, 3) for _ in range(config.blocks))
        self.fold_out = nn.Conv3d(width, folded, 1)
        fixed = config.quantizer == "fsq"
        table = scalar_grid(config.levels) if fixed else torch.zeros(config.codebook_size, config.code_dim)
        self.register_buffer("codebook", table)

    def grid(self, t: int, h: int, w: int) -> tuple[int, int, int]:
        """Token grid of a latent grid; the patches at its right and lower edge may reach beyond it.

        Raises ValueError if t is not made of whole groups.
        """
        if not t or t % GROUP_LATENTS:
            raise ValueError(f"latents of {t}×{h}×{w}: expected {GROUP_LATENTS}·n frames, n at least 1")
        return tuple(-(-size // patch) for size, patch in zip((t, h, w), self.config.patch, strict=True))  # type: ignore[return-value]

    def features(self, latents_BCthw: Tensor) -> Tensor:
        """Unquantised codes [B·G, t'/G, h', w', D]."""
        self.grid(*latents_BCthw.shape[2:])
        pt, ph, pw = self.config.patch
        height, width = latents_BCthw.shape[3:]
        x = rearrange(
            F.pad(latents_BCthw, (0, -width % pw, 0, -height % ph, 0, 0), mode="replicate"),
            "b c (g t u) (h p) (w q) -> (b g) (c u p q) t h w",
            t=GROUP_LATENTS // pt, u=pt, p=ph, q=pw,
        )  # fmt: skip
        x = self.fold_in(x)
        for block in self.encoder:
            x = block(x)
        codes = rearrange(self.to_code(x), "n d t h w -> n t h w d")
        if self.config.quantizer == "fsq":
            return bounded(codes.float(), self.config.levels)
        return F.normalize(codes.float(), dim=-1) if self.config.metric == "cosine" else codes.float()

    def nearest(self, codes_ND: Tensor) -> Tensor:
        """The nearest codes' numbers [N]."""
        return (self.codebook.square().sum(-1) - 2.0 * codes_ND @ self.codebook.T).argmin(-1)

    def rebuild(self, codes_NthwD: Tensor, batch: int, size: tuple[int, int] | None = None) -> Tensor:
        """Latents [B, C, t, h, w] of quantised codes [B·G, t'/G, h', w', D]; `size` (h, w): see `decode`."""
        x = self.from_code(rearrange(codes_NthwD, "n t h w d -> n d t h w"))
        for block in self.decoder:
            x = block(x)
        pt, ph, pw = self.config.patch
        latents = rearrange(
            self.fold_out(x),
            "(b g) (c u p q) t h w -> b c (g t u) (h p) (w q)",
            b=batch, c=self.latent_channels, u=pt, p=ph, q=pw,
        ).float()  # fmt: skip
        return latents if size is None else latents[..., : size[0], : size[1]]

    @torch.no_grad()
    def encode(self, latents_BCthw: Tensor) -> Tensor:
        """Tokens int64 [B, t', h', w']: the nearest code of each feature. ValueError if the grid does not fit."""
        codes = self.features(latents_BCthw)
        return rearrange(self.nearest(codes), "(b g) t h w -> b (g t) h w", b=len(latents_BCthw))

    @torch.no_grad()
    def decode(self, tokens_Bthw: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Coarse latent ẑ [B, C, t, h, w] of tokens [B, t', h', w'], cut to the latent grid `size` (h, w).

        Without `size` the grid is that of whole patches. Raises ValueError on unknown codes.
        """
        if tokens_Bthw.numel() and not 0 <= int(tokens_Bthw.min()) <= int(tokens_Bthw.max()) < len(self.codebook):
            raise ValueError(
                f"tokens from {int(tokens_Bthw.min())} to {int(tokens_Bthw.max())}: expected 0 to "
                f"{len(self.codebook) - 1}; were they made with another codebook?"
            )
        codes = self.codebook[tokens_Bthw.long()]
        per_group = GROUP_LATENTS // self.config.patch[0]
        return self.rebuild(rearrange(codes, "b (g t) h w d -> (b g) t h w d", t=per_group), len(tokens_Bthw), size)


def scalar_grid(levels: Sequence[int]) -> Tensor:
    """All codes [K, D] of finite scalar quantisation (FSQ, Mentzer et al. 2023): evenly spaced levels in [−1, 1]."""
    axes = [torch.linspace(-1, 1, count) for count in levels]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)


def bounded(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Into [−1, 1], and half a level beyond, so that the outer levels are as wide as the others."""
    reach = torch.tensor([count / (count - 1) for count in levels], device=codes.device)
    return torch.tanh(codes) * reach


def load_codec(path: str | Path, device: str | torch.device = "cpu") -> LatentCodec:
    """The codec at `path`, frozen, in evaluation mode. Raises ArtifactError."""
    artifact = load_artifact(path, "codec")
    settings, tensors = dict(artifact.config), artifact.tensors(device)
    with building(artifact):
        channels = settings.pop("latent_channels")
        with torch.device("meta"):
            codec = LatentCodec(CodecConfig.model_validate(settings), channels)
        codec.load_state_dict(tensors, assign=True)
    return codec.eval().requires_grad_(False)
