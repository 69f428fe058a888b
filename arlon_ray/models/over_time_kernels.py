"""Triton kernels of `over_time`. Imported only where Triton is there.

Channels of queries and keys are held in two halves, the even and the odd ones: a rotation turns pairs of them, and
their products are sums over both. Legend: T frames, D channels of a head, A heads; BT and BH: powers of two beyond T
and D/2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Warps of a program; there is little to do in one, and many of them.
WARPS = 4


@triton.jit
def _halves(ptr, places, mask):
    even = tl.load(ptr + places, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(ptr + places + 1, mask=mask, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def _root(even, odd, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(even * even, 1) + tl.sum(odd * odd, 1)) / D + eps)[:, None]


@triton.jit
def _turned(even, odd, cos, sin):
    return even * cos - odd * sin, odd * cos + even * sin


@triton.jit
def _shares(q_even, q_odd, k_even, k_odd, frames, T, scale, PRECISION: tl.constexpr):
    score = tl.dot(q_even, tl.trans(k_even), input_precision=PRECISION)
    score = tl.dot(q_odd, tl.trans(k_odd), score, input_precision=PRECISION) * scale
    score = tl.where((frames < T)[None, :], score, float("-inf"))
    share = tl.exp(score - tl.max(score, 1)[:, None])
    return share / tl.sum(share, 1)[:, None]


@triton.jit
def _attend(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, out_ptr, T, S, eps, scale,
    A: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    dtype = qkv_ptr.dtype.element_ty
    frames, half, channels = tl.arange(0, BT), tl.arange(0, BH), tl.arange(0, 2 * BH)
    first = (sequence // S).to(tl.int64) * T * S + sequence % S
    rows = (first + frames * S)[:, None]
    there, pairs = (frames < T)[:, None], (half < D // 2)[None, :]
    places = rows * (3 * A * D) + head * D + 2 * half[None, :]
    q_even, q_odd = _halves(qkv_ptr, places, there & pairs)
    k_even, k_odd = _halves(qkv_ptr + A * D, places, there & pairs)
    if NORMED:
        w_even, w_odd = _halves(q_norm_ptr, 2 * half[None, :], pairs)
        root = _root(q_even, q_odd, eps, D)
        q_even, q_odd = q_even * root * w_even, q_odd * root * w_odd
        w_even, w_odd = _halves(k_norm_ptr, 2 * half[None, :], pairs)
        root = _root(k_even, k_odd, eps, D)
        k_even, k_odd = k_even * root * w_even, k_odd * root * w_odd
    turn = frames[:, None] * D + 2 * half[None, :]
    cos = tl.load(cos_ptr + turn, mask=there & pairs, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=there & pairs, other=0.0)
    q_even, q_odd = _turned(q_even, q_odd, cos, sin)
    k_even, k_odd = _turned(k_even, k_odd, cos, sin)
    share = _shares(
        q_even.to(dtype), q_odd.to(dtype), k_even.to(dtype), k_odd.to(dtype), frames, T, scale, PRECISION
    )  # fmt: skip
    mask = there & (channels < D)[None, :]
    own = head * D + channels[None, :]
    v = tl.load(qkv_ptr + rows * (3 * A * D) + 2 * A * D + own, mask=mask, other=0.0)
    y = tl.dot(share.to(dtype), v, input_precision=PRECISION)
    tl.store(out_ptr + rows * (A * D) + own, y.to(dtype), mask=mask)


@triton.jit
def _unturned(even, odd, cos, sin):
    return even * cos + odd * sin, odd * cos - even * sin


@triton.jit
def _unnormed(d_even, d_odd, even, odd, root, w_even, w_odd, D: tl.constexpr):
    """Of y = x · root · w: what is asked of x, and of w over the frames."""
    g_even, g_odd = d_even * w_even, d_odd * w_odd
    along = (tl.sum(g_even * even, 1) + tl.sum(g_odd * odd, 1))[:, None] * root * root / D
    of_w_even, of_w_odd = tl.sum(d_even * even * root, 0), tl.sum(d_odd * odd * root, 0)
    return root * (g_even - even * along), root * (g_odd - odd * along), of_w_even, of_w_odd


@triton.jit
def _differentiate(
    grad_ptr, qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, out_ptr, norms_ptr, T, S, eps, scale,
    A: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence, head = tl.program_id(0), tl.program_id(1)
    dtype = qkv_ptr.dtype.element_ty
    frames, half, channels = tl.arange(0, BT), tl.arange(0, BH), tl.arange(0, 2 * BH)
    first = (sequence // S).to(tl.int64) * T * S + sequence % S
    rows = (first + frames * S)[:, None]
    there, pairs = (frames < T)[:, None], (half < D // 2)[None, :]
    places = rows * (3 * A * D) + head * D + 2 * half[None, :]
    turn = frames[:, None] * D + 2 * half[None, :]
    cos = tl.load(cos_ptr + turn, mask=there & pairs, other=0.0)
    sin = tl.load(sin_ptr + turn, mask=there & pairs, other=0.0)
    # queries and keys once more
    q_even, q_odd = _halves(qkv_ptr, places, there & pairs)
    k_even, k_odd = _halves(qkv_ptr + A * D, places, there & pairs)
    if NORMED:
        qw_even, qw_odd = _halves(q_norm_ptr, 2 * half[None, :], pairs)
        kw_even, kw_odd = _halves(k_norm_ptr, 2 * half[None, :], pairs)
        q_root, k_root = _root(q_even, q_odd, eps, D), _root(k_even, k_odd, eps, D)
        tq_even, tq_odd = _turned(q_even * q_root * qw_even, q_odd * q_root * qw_odd, cos, sin)
        tk_even, tk_odd = _turned(k_even * k_root * kw_even, k_odd * k_root * kw_odd, cos, sin)
    else:
        tq_even, tq_odd = _turned(q_even, q_odd, cos, sin)
        tk_even, tk_odd = _turned(k_even, k_odd, cos, sin)
    tq_even, tq_odd, tk_even, tk_odd = tq_even.to(dtype), tq_odd.to(dtype), tk_even.to(dtype), tk_odd.to(dtype)
    share = _shares(tq_even, tq_odd, tk_even, tk_odd, frames, T, scale, PRECISION)
    # attention
    mask = there & (channels < D)[None, :]
    own = head * D + channels[None, :]
    v = tl.load(qkv_ptr + rows * (3 * A * D) + 2 * A * D + own, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + rows * (A * D) + own, mask=mask, other=0.0).to(dtype)
    d_v = tl.dot(tl.trans(share.to(dtype)), grad, input_precision=PRECISION)
    d_share = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    d_score = (share * (d_share - tl.sum(share * d_share, 1)[:, None]) * scale).to(dtype)
    turned_back = tl.trans(d_score)
    dq_even = tl.dot(d_score, tk_even, input_precision=PRECISION)
    dq_odd = tl.dot(d_score, tk_odd, input_precision=PRECISION)
    dk_even = tl.dot(turned_back, tq_even, input_precision=PRECISION)
    dk_odd = tl.dot(turned_back, tq_odd, input_precision=PRECISION)
    dq_even, dq_odd = _unturned(dq_even, dq_odd, cos, sin)
    dk_even, dk_odd = _unturned(dk_even, dk_odd, cos, sin)
    if NORMED:
        dq_even, dq_odd, of_even, of_odd = _unnormed(dq_even, dq_odd, q_even, q_odd, q_root, qw_even, qw_odd, D)
        mine = norms_ptr + (sequence.to(tl.int64) * A + head) * (2 * D) + 2 * half
        tl.store(mine, of_even, mask=half < D // 2)
        tl.store(mine + 1, of_odd, mask=half < D // 2)
        dk_even, dk_odd, of_even, of_odd = _unnormed(dk_even, dk_odd, k_even, k_odd, k_root, kw_even, kw_odd, D)
        tl.store(mine + D, of_even, mask=half < D // 2)
        tl.store(mine + D + 1, of_odd, mask=half < D // 2)
    out = out_ptr + rows * (3 * A * D) + own
    tl.store(out, tl.interleave(dq_even, dq_odd).to(dtype), mask=mask)
    tl.store(out + A * D, tl.interleave(dk_even, dk_odd).to(dtype), mask=mask)
    tl.store(out + 2 * A * D, d_v.to(dtype), mask=mask)


def _arguments(
    qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[tuple[int, int], list[Tensor], tuple[int, int, float, float], dict[str, int | str | bool]]:
    """The grid, the tensors that are read, the numbers, and what the kernels are compiled for.

    Sequences come first in the grid: only of these may it have many.
    """
    batch, frames, places, width = qkv.shape
    channels = cos.shape[1]
    heads = width // 3 // channels
    constants: dict[str, int | str | bool] = {
        "A": heads, "D": channels, "BT": max(16, triton.next_power_of_2(frames)),
        "BH": max(16, triton.next_power_of_2(channels // 2)), "NORMED": queries is not None,
        "PRECISION": "ieee" if qkv.dtype is torch.float32 else "tf32", "num_warps": WARPS,
    }  # fmt: skip
    read = [part.contiguous() for part in (qkv, cos if queries is None else queries, cos if keys is None else keys)]
    numbers = (frames, places, eps, channels**-0.5)
    return (batch * places, heads), [*read, cos.contiguous(), sin.contiguous()], numbers, constants


def forward(qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """See `over_time.attention_over_time`."""
    grid, read, numbers, constants = _arguments(qkv, queries, keys, cos, sin, eps)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    _attend[grid](*read, out, *numbers, **constants)
    return out


def backward(
    grad: Tensor, qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What is asked of `qkv`, and of the norms' weights [2, D]."""
    grid, read, numbers, constants = _arguments(qkv, queries, keys, cos, sin, eps)
    out, programs = qkv.new_empty(qkv.shape), 0 if queries is None else grid[0] * grid[1]
    parts = qkv.new_empty(programs, 2, cos.shape[1], dtype=torch.float32)
    _differentiate[grid](grad.contiguous(), *read, out, parts if programs else cos, *numbers, **constants)
    return out, parts.sum(0)
