"""Attention over time on a GPU: many short sequences, which the kernels for long ones fill to a hundredth.

A latent has as many sequences of 5 to 20 frames as it has places. One program takes a place and a head: it reads
queries, keys and values where the projection put them, norms and turns them, attends, and writes to where the output's
projection reads; backward it does all of it again from the same input. Nothing is copied into another order between.

Legend: B batch, T frames, S places of a frame, C channels, A heads, D channels of a head.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

#: The most frames and channels of a head that one program has room for.
MOST_FRAMES, MOST_CHANNELS = 64, 128
_HAS_TRITON = find_spec("triton") is not None


def fits(x_BTSC: Tensor, heads: int) -> bool:
    """Whether `attention_over_time` computes it here: on a GPU with Triton, and short enough."""
    channels = x_BTSC.shape[-1] // heads
    short = x_BTSC.shape[1] <= MOST_FRAMES and channels <= MOST_CHANNELS and channels % 2 == 0
    return _HAS_TRITON and x_BTSC.is_cuda and short


def attention_over_time(
    qkv_BTSC: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotary: tuple[Tensor, Tensor],
) -> Tensor:
    """Attention within each of the B·S sequences of T frames: [B, T, S, C] of queries, keys and values [B, T, S, 3·C].

    `norms`: weights [D] of the RMS norms of queries and keys. `rotary`: cosines and sines [T, D].
    """
    cos, sin = (part.float() for part in rotary)
    queries, keys = norms or (None, None)
    attended: Tensor = _forward(qkv_BTSC, queries, keys, cos, sin, heads, eps)
    return attended


def _shapes(qkv: Tensor) -> tuple[int, int, int, int]:
    batch, frames, places, width = qkv.shape
    return batch, frames, places, width // 3


@torch.library.custom_op(
    "arlon_ray::attention_over_time",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? queries, Tensor? keys, Tensor cos, Tensor sin, int heads, float eps) -> Tensor",
)
def _forward(
    qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> Tensor:
    from arlon_ray.models import over_time_kernels

    return over_time_kernels.forward(qkv.contiguous(), queries, keys, cos.contiguous(), sin.contiguous(), heads, eps)


@_forward.register_fake
def _(
    qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> Tensor:
    return qkv.new_empty(_shapes(qkv))


@torch.library.custom_op(
    "arlon_ray::attention_over_time_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? queries, Tensor? keys, Tensor cos, Tensor sin, int heads, float eps)"
    " -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from arlon_ray.models import over_time_kernels

    return over_time_kernels.backward(
        grad.contiguous(), qkv.contiguous(), queries, keys, cos.contiguous(), sin.contiguous(), heads, eps
    )


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), qkv.new_empty(2, qkv.shape[-1] // 3 // heads, dtype=torch.float32)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    qkv, queries, keys, cos, sin = ctx.saved_tensors
    d_qkv, d_norms = _backward(grad, qkv, queries, keys, cos, sin, ctx.heads, ctx.eps)
    of_norms = (None, None) if queries is None else (d_norms[0].to(queries.dtype), d_norms[1].to(keys.dtype))
    return d_qkv, *of_norms, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
