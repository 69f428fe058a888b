"""Layers that the DiT (and, for RMS norm, the AR) are built from; parameter names are Open-Sora v1.2's.

Legend: B batch, T frames, S places of a frame, N tokens, L text tokens, C channels, A heads, D channels of a head.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Literal, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.models import over_time
from arlon_ray.native.dit import cross_attention, gelu_in_place, library_for, self_attention

#: What the tokens of a segment attend to: those of their frame, those of their place in all frames, or all.
Over = Literal["space", "time", "all"]


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, computed in float32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] to the same."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        hidden = self.fc1(x)
        built = library_for(hidden)
        gelu = F.gelu(hidden, approximate="tanh") if built is None else gelu_in_place(built, hidden)
        return self.fc2(gelu)


class RotaryEmbedding(nn.Module):
    """Rotary positions over one axis; pairs of neighbouring channels are rotated. `freqs` is part of the state."""

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        # by Python: on the meta device torch's own powers import its compiler, which takes seconds
        freqs = [theta ** (-channel / dim) for channel in range(0, dim, 2)]
        self.freqs = nn.Parameter(torch.tensor(freqs), requires_grad=False)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [N, D] of integer positions [N]."""
        angles = (positions.float()[:, None] * self.freqs.float()).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def rotate(x_BAND: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) by the angles given, cosines and sines of which stand twice."""
    if x_BAND.device.type == "cpu" and x_BAND.dtype is torch.float32 and not torch.compiler.is_compiling():
        turn = torch.complex(cos_ND[..., ::2], sin_ND[..., ::2])
        return torch.view_as_real(torch.view_as_complex(x_BAND.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    even, odd = x_BAND[..., 0::2], x_BAND[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x_BAND * cos_ND.to(x_BAND.dtype) + turned * sin_ND.to(x_BAND.dtype)


def attend(q_BAND: Tensor, k_BALD: Tensor, v_BALD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention. `mask` is boolean (True: may attend) and broadcasts to [B, A, N, L].

    On a CPU in bfloat16 plain matmul and softmax are faster than the fused path at small sizes (docs/tiny.md).
    """
    small_on_cpu = q_BAND.device.type == "cpu" and q_BAND.shape[-2] * k_BALD.shape[-2] <= 1 << 18
    if not small_on_cpu or q_BAND.dtype is torch.float32:
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
        x_BTSC: Tensor,
        over: Over,
        rotary: tuple[Tensor, Tensor] | None = None,
        parallel: FrameSharing | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """[B, T, S, C] to the same: within each frame, over time at each place, or over all tokens.

        `rotary`: cosines and sines of the frames, or for `all` of the tokens. `parallel`: T is a share of the frames,
        of which only the first `frames` are attended to.
        """
        if parallel is None and (attended := self._fused(x_BTSC, over, rotary)) is not None:
            return self.proj(attended)
        batch, _, places, _ = x_BTSC.shape
        if over == "time":
            y = self._within(rearrange(x_BTSC, "b t s c -> (b s) t c"), rotary, parallel, frames)
            return rearrange(y, "(b s) t c -> b t s c", b=batch)
        if over == "space":
            return self._within(x_BTSC.flatten(0, 1)).view_as(x_BTSC)
        tokens = None if frames is None else frames * places
        return self._within(x_BTSC.flatten(1, 2), rotary, parallel, tokens).view_as(x_BTSC)

    def _fused(self, x_BTSC: Tensor, over: Over, rotary: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """What `proj` is given, by our C++ or Triton from what `qkv` gives; None where neither computes it."""
        built = library_for(x_BTSC, self.heads)
        on_gpu = (
            built is None
            and over == "time"
            and rotary is not None
            and over_time.fits(x_BTSC, self.proj.in_features // self.heads)
        )
        if built is None and not on_gpu:
            return None
        norms, eps = None, 0.0
        if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        qkv = self.qkv(x_BTSC)
        if built is None:
            assert rotary is not None
            return over_time.attention_over_time(qkv, norms, eps, rotary)
        qkv = qkv.flatten(1, 2)[:, None] if over == "all" else qkv
        turned = None if over == "space" else rotary
        attended = self_attention(built, qkv, self.heads, norms, eps, turned, over_time=over == "time")
        return attended.view_as(x_BTSC)

    def _within(
        self,
        x_BNC: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        parallel: FrameSharing | None = None,
        tokens: int | None = None,
    ) -> Tensor:
        """Of each sequence of N tokens. `parallel`: a share of a sequence, of which the first `tokens` are seen."""
        q, k, v = self.qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if parallel is None:
            return self.proj(rearrange(attend(q, k, v), "b a n d -> b n (a d)"))
        q, k, v = (parallel.to_heads(part) for part in (q, k, v))
        attended = parallel.to_tokens(attend(q, k[:, :, :tokens], v[:, :, :tokens]))
        return self.proj(rearrange(attended, "b a n d -> b n (a d)"))


class CrossAttention(nn.Module):
    """Multi-head attention to the text. Padding is masked, or left out where the lengths of texts are known."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(dim, dim)
        self.kv_linear = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, A, L, D] of the text: the same at every denoising step."""
        k, v = rearrange(self.kv_linear(text_BLC), "b l (two a d) -> two b a l d", two=2, a=self.heads).contiguous()
        return k, v

    def forward(
        self, x_BNC: Tensor, keys_values: tuple[Tensor, Tensor], real: Tensor | tuple[int, ...] | None
    ) -> Tensor:
        """`real`: the mask [B, L] of real text tokens, or how many each text begins with; None: all are."""
        q_BNC = self.q_linear(x_BNC)
        built = library_for(q_BNC, self.heads)
        if built is not None and not isinstance(real, Tensor):
            lengths = real or (keys_values[0].shape[2],) * len(q_BNC)
            return self.proj(cross_attention(built, q_BNC, *keys_values, lengths))
        q = rearrange(q_BNC, "b n (a d) -> b a n d", a=self.heads)
        if isinstance(real, tuple):
            attended = _attend_lengths(q, *keys_values, real)
        else:
            attended = attend(q, *keys_values, None if real is None else real[:, None, None, :])
        return self.proj(rearrange(attended, "b a n d -> b n (a d)"))


def _attend_lengths(q_BAND: Tensor, k_BALD: Tensor, v_BALD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Neighbours of one length at once: a mask would keep the fastest kernels from being used, and padding costs."""
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    parts = zip(*(tensor.split([count for _, count in runs]) for tensor in (q_BAND, k_BALD, v_BALD)), strict=True)
    attended = [
        attend(q, k[:, :, :length], v[:, :, :length]) for (q, k, v), (length, _) in zip(parts, runs, strict=True)
    ]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


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
        """Values [B] to [B, C]."""
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
