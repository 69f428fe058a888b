"""Layers that the DiT (and, for RMS norm, the AR) are built from; parameter names are Open-Sora v1.2's.

Legend: B batch, N tokens, L text tokens, C channels, A heads, D channels of a head.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RotaryEmbedding(nn.Module):
    """Rotary positions over one axis; pairs of neighbouring channels are rotated. `freqs` is part of the state."""

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        freqs = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
        self.freqs = nn.Parameter(freqs, requires_grad=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, D] of integer positions [N]."""
        angles = (positions.float()[:, None] * self.freqs.float()).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x_BAND: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) by the angles given."""
    even, odd = x_BAND[..., 0::2], x_BAND[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x_BAND * cos_ND.to(x_BAND.dtype) + turned * sin_ND.to(x_BAND.dtype)


def attend(q_BAND: Tensor, k_BALD: Tensor, v_BALD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention. `mask` is boolean (True: may attend) and broadcasts to [B, A, N, L].

    On a CPU in bfloat16 plain matmul and softmax are faster than the fused path at small sizes (docs/tiny.md).
    """
    small_on_cpu = q_BAND.device.type == "cpu" and q_BAND.shape[-2] * k_BALD.shape[-2] <= 1 << 18
    if not small_on_cpu:
        return F.scaled_dot_product_attention(q_BAND, k_BALD, v_BALD, attn_mask=mask)
    scores = (q_BAND * q_BAND.shape[-1] ** -0.5) @ k_BALD.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v_BALD.dtype) @ v_BALD


class FrameSharing(Protocol):
    """How ranks that share the frames of a sample exchange them (`arlon_ray.training.sequence`)."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal share along `dim`, which is filled up with zeros where it cannot be divided."""

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All shares, without what filled them up: `length` along `dim`."""

    def to_heads(self, x_BAND: Tensor) -> Tensor:
        """[B, A, N, D] of this rank's tokens to [B, A/ranks, N·ranks, D]: all tokens for some heads."""

    def to_tokens(self, x_BAND: Tensor) -> Tensor:
        """What `to_heads` did, undone."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with RMS-normed queries and keys (before the rotary positions)."""

    def __init__(self, dim: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x_BNC: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        parallel: FrameSharing | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """`parallel`: the N tokens are a share of a sequence, of which only the first `tokens` are attended to."""
        q, k, v = rearrange(self.qkv(x_BNC), "b n (three a d) -> three b a n d", three=3, a=self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if parallel is None:
            return self.proj(rearrange(attend(q, k, v), "b a n d -> b n (a d)"))
        q, k, v = (parallel.to_heads(part) for part in (q, k, v))
        attended = parallel.to_tokens(attend(q, k[:, :, :tokens], v[:, :, :tokens]))
        return self.proj(rearrange(attended, "b a n d -> b n (a d)"))


class CrossAttention(nn.Module):
    """Multi-head attention to the text; padded text tokens are masked."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, A, L, D] of the text: the same at every denoising step."""
        k, v = rearrange(self.kv_linear(text_BLC), "b l (two a d) -> two b a l d", two=2, a=self.heads)
        return k, v

    def forward(self, x_BNC: Tensor, keys_values: tuple[Tensor, Tensor], mask_BL: Tensor | None) -> Tensor:
        q = rearrange(self.q_linear(x_BNC), "b n (a d) -> b a n d", a=self.heads)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        return self.proj(rearrange(attend(q, *keys_values, mask), "b a n d -> b n (a d)"))


def sinusoidal(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos, sin] features [N, dim] of values [N] (DDPM time-step embedding)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, device=values.device).float() / half)
    angles = values.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """A scalar per sample (time step, frame rate) to [B, C]."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, values_B: Tensor) -> Tensor:
        weight = next(self.mlp.parameters())
        return self.mlp(sinusoidal(values_B, self.frequencies).to(weight.dtype))


def position_table(height: int, width: int, dim: int, scale: float, device: torch.device) -> Tensor:
    """2-D sine-cosine positions [h·w, dim] of Open-Sora v1.2: the grid stretched to a square, divided by `scale`.

    The first half of the channels holds the column, the second the row.
    """
    half = dim // 2
    inverse = 1.0 / 10000 ** (torch.arange(0, half, 2, device=device).float() / half)
    base = round((height * width) ** 0.5)

    def features(count: int) -> Tensor:
        angles = (torch.arange(count, device=device).float() / scale * (base / count))[:, None] * inverse
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = features(width)[None].expand(height, -1, -1)
    rows = features(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).reshape(height * width, dim)
