"""Triton kernels of the AR's step on a GPU: few launches a layer, each as fast as the memory gives it the weights.

A layer of plain kernels spends half of a step at batch 1 between kernels and in small ones. Here a layer is four to
five: norm and queries/keys/values; norms of heads, rotation, cache and attention; output and residual; norm, gate and
up; down and residual. Imported only where Triton is there.

Legend: R rows, O outputs, C inputs, A heads, D channels a head, P positions stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _one_row(
    x_ptr, norm_ptr, w_ptr, added_ptr, out_ptr, outs, ins, eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BO + tl.arange(0, BO)
    there = outputs < outs
    total = tl.zeros((BO, BC), tl.float32)
    above = tl.zeros((BO, BC), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    begin = outputs.to(tl.int64)[:, None] * ins
    for first in range(0, ins, BC):
        inputs = first + tl.arange(0, BC)
        inside = inputs < ins
        mask = there[:, None] & inside[None, :]
        w = tl.load(w_ptr + begin + inputs[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + inputs, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x = x * tl.load(norm_ptr + inputs, mask=inside, other=0.0)
        total += w * x[None, :]
        if GATED:
            u = tl.load(w_ptr + begin + outs.to(tl.int64) * ins + inputs[None, :], mask=mask, other=0.0).to(tl.float32)
            above += u * x[None, :]
    y = tl.sum(total, 1)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) + eps)
        y = y * scale
    if GATED:
        y = y * tl.sigmoid(y) * (tl.sum(above, 1) * scale)
    if ADDED:
        y += tl.load(added_ptr + outputs, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, y.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _rows(
    x_ptr, norm_ptr, w_ptr, added_ptr, out_ptr, count, outs, ins, eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BO + tl.arange(0, BO)
    rows = tl.program_id(1) * BR + tl.arange(0, BR)
    there = outputs < outs
    total = tl.zeros((BO, BR), tl.float32)
    above = tl.zeros((BO, BR), tl.float32)
    squares = tl.zeros((BR,), tl.float32)
    begin = outputs.to(tl.int64)[:, None] * ins
    for first in range(0, ins, BC):
        inputs = first + tl.arange(0, BC)
        inside = inputs < ins
        mask = there[:, None] & inside[None, :]
        w = tl.load(w_ptr + begin + inputs[None, :], mask=mask, other=0.0)
        x = tl.load(
            x_ptr + rows[None, :] * ins + inputs[:, None], mask=inside[:, None] & (rows < count)[None, :], other=0.0
        )
        if NORMED:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 0)
            x = (wide * tl.load(norm_ptr + inputs, mask=inside, other=0.0)[:, None]).to(x.dtype)
        total = tl.dot(w, x, total, input_precision=PRECISION)
        if GATED:
            u = tl.load(w_ptr + begin + outs.to(tl.int64) * ins + inputs[None, :], mask=mask, other=0.0)
            above = tl.dot(u, x, above, input_precision=PRECISION)
    if NORMED:
        scale = tl.rsqrt(squares + eps)
        total = total * scale[None, :]
        above = above * scale[None, :]
    if GATED:
        total = total * tl.sigmoid(total) * above
    places = rows[None, :] * outs + outputs[:, None]
    mask = there[:, None] & (rows < count)[None, :]
    if ADDED:
        total += tl.load(added_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    qkv_ptr, norm_ptr, turn_ptr, at_ptr, filled_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, weight_ptr, P, eps, scale,
    A: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    new = tl.load(filled_ptr + row)
    half = tl.arange(0, BD // 2)
    half_there = half < D // 2
    channels = tl.arange(0, BD)
    there = channels < D
    own = qkv_ptr + row * (3 * A * D) + head * D
    turn = turn_ptr + tl.load(at_ptr + row) * (2 * D) + 2 * half
    # the query, normed and turned
    even = tl.load(own + 2 * half, mask=half_there, other=0.0).to(tl.float32)
    odd = tl.load(own + 2 * half + 1, mask=half_there, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(even * even, 0) + tl.sum(odd * odd, 0) + eps)
    even *= factor * tl.load(norm_ptr + 2 * half, mask=half_there, other=0.0)
    odd *= factor * tl.load(norm_ptr + 2 * half + 1, mask=half_there, other=0.0)
    cos = tl.load(turn, mask=half_there, other=0.0)
    sin = tl.load(turn + 1, mask=half_there, other=0.0)
    q = tl.interleave(even * cos - odd * sin, odd * cos + even * sin) * scale
    # what is seen before
    begin = (row * A + head).to(tl.int64) * P * D
    each = tl.cdiv(tl.cdiv(new + 1, PARTS), BP) * BP
    first, last = part * each, tl.minimum(part * each + each, new)
    highest = -1.0e30
    total = 0.0
    y = tl.zeros((BD,), tl.float32)
    for start in range(first, last, BP):
        positions = start + tl.arange(0, BP)
        seen = positions < last
        seen = seen & (tl.load(visible_ptr + row * P + positions, mask=seen, other=0) != 0)
        places = begin + positions[:, None] * D + channels[None, :]
        mask = seen[:, None] & there[None, :]
        k = tl.load(k_ptr + places, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + places, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], 1), -1.0e30)
        higher = tl.maximum(highest, tl.max(score, 0))
        share = tl.where(seen, tl.exp(score - higher), 0.0)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(share, 0)
        y = y * shrink + tl.sum(share[:, None] * v, 0)
        highest = higher
    if (first <= new) & (new < first + each):
        # the new position: its key, normed and turned, and its value; both are kept
        even = tl.load(own + A * D + 2 * half, mask=half_there, other=0.0).to(tl.float32)
        odd = tl.load(own + A * D + 2 * half + 1, mask=half_there, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(even * even, 0) + tl.sum(odd * odd, 0) + eps)
        even *= factor * tl.load(norm_ptr + D + 2 * half, mask=half_there, other=0.0)
        odd *= factor * tl.load(norm_ptr + D + 2 * half + 1, mask=half_there, other=0.0)
        cos = tl.load(turn + D, mask=half_there, other=0.0)
        sin = tl.load(turn + D + 1, mask=half_there, other=0.0)
        k_new = tl.interleave(even * cos - odd * sin, odd * cos + even * sin).to(k_ptr.dtype.element_ty)
        v_new = tl.load(own + 2 * A * D + channels, mask=there, other=0.0)
        tl.store(k_ptr + begin + new * D + channels, k_new, mask=there)
        tl.store(v_ptr + begin + new * D + channels, v_new, mask=there)
        score_new = tl.sum(k_new.to(tl.float32) * q, 0)
        higher_new = tl.maximum(highest, score_new)
        shrink_new = tl.exp(highest - higher_new)
        share_new = tl.exp(score_new - higher_new)
        total = total * shrink_new + share_new
        y = y * shrink_new + share_new * v_new.to(tl.float32)
        highest = higher_new
    if PARTS == 1:
        tl.store(out_ptr + (row * A + head) * D + channels, (y / total).to(out_ptr.dtype.element_ty), mask=there)
    else:
        place = (row * A + head) * PARTS + part
        tl.store(out_ptr + place * D + channels, y, mask=there)
        tl.store(weight_ptr + 2 * place, highest)
        tl.store(weight_ptr + 2 * place + 1, total)


@triton.jit
def _combine(y_ptr, weight_ptr, out_ptr, D: tl.constexpr, BD: tl.constexpr, PARTS: tl.constexpr):
    own = tl.program_id(0)
    parts, channels = tl.arange(0, PARTS), tl.arange(0, BD)
    there = channels < D
    highest = tl.load(weight_ptr + 2 * (own * PARTS + parts))
    total = tl.load(weight_ptr + 2 * (own * PARTS + parts) + 1)
    factor = tl.exp(highest - tl.max(highest, 0))
    y = tl.load(y_ptr + (own * PARTS + parts)[:, None] * D + channels[None, :], mask=there[None, :], other=0.0)
    y = tl.sum(y * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out_ptr + own * D + channels, y.to(out_ptr.dtype.element_ty), mask=there)


def product(
    x_RC: Tensor,
    weight_OC: Tensor,
    added_RO: Tensor | None = None,
    norm_C: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> Tensor:
    """x @ weightᵀ [R, O] (+ added), of x as it is or normed: x · rsqrt(Σx² + eps) · norm (float32).

    `gated`: `weight` has 2·O rows, and silu of the first half times the second comes out (SwiGLU).
    """
    rows, inputs = x_RC.shape
    outputs = len(weight_OC) // 2 if gated else len(weight_OC)
    out = torch.empty(rows, outputs, device=x_RC.device, dtype=x_RC.dtype)
    norm, added = x_RC if norm_C is None else norm_C, x_RC if added_RO is None else added_RO
    kinds = {"NORMED": norm_C is not None, "GATED": gated, "ADDED": added_RO is not None}
    if rows == 1:
        block, width = (4 if gated or outputs < 4096 else 8), min(1024, triton.next_power_of_2(inputs))
        _one_row[(triton.cdiv(outputs, block),)](
            x_RC, norm, weight_OC, added, out, outputs, inputs, eps, **kinds, BO=block, BC=width, num_warps=4
        )  # fmt: skip
    else:
        block = 16
        precision = "ieee" if x_RC.dtype == torch.float32 else "tf32"
        width = 128 if x_RC.dtype == torch.float32 else 256
        _rows[(triton.cdiv(outputs, block), triton.cdiv(rows, 16))](
            x_RC, norm, weight_OC, added, out, rows, outputs, inputs, eps, **kinds,
            BO=block, BC=width, BR=16, PRECISION=precision, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def attend(
    qkv_R: Tensor, norms_2D: Tensor, eps: float, turns: Tensor, at_R: Tensor, filled_R: Tensor,
    keys: Tensor, values: Tensor, visible_RP: Tensor, heads: int, parts: int,
) -> Tensor:  # fmt: skip
    """Norms and turns queries and keys, stores keys and values at `filled_R`, attends to all up to there: [R, C].

    `qkv_R` [R, 3·C]; `norms_2D` and `eps` as `product` has them, of queries and of keys; `turns` (complex) of which
    [2, D/2] at `at_R` count for the rows; `keys` and `values` [rows, A, P, D]. `parts` share a row's positions.
    """
    rows, head_dim, stored = len(qkv_R), keys.shape[-1], keys.shape[2]
    out = torch.empty(rows, heads * head_dim, device=qkv_R.device, dtype=qkv_R.dtype)
    wide = triton.next_power_of_2(head_dim)
    partial, weights = out, out
    if parts > 1:
        partial = torch.empty(rows * heads * parts, head_dim, device=qkv_R.device, dtype=torch.float32)
        weights = torch.empty(rows * heads * parts, 2, device=qkv_R.device, dtype=torch.float32)
    _attend[(rows, heads, parts)](
        qkv_R, norms_2D, torch.view_as_real(turns), at_R, filled_R, keys, values, visible_RP.view(torch.uint8), partial,
        weights, stored, eps, head_dim**-0.5,
        A=heads, D=head_dim, BD=wide, BP=64, PARTS=parts, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _combine[(rows * heads,)](partial, weights, out, D=head_dim, BD=wide, PARTS=parts, num_warps=2)
    return out
