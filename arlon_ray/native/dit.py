"""What the DiT does between its products of matrices, in calls of `dit.cpp`: norms, attention, GELU.

For tensors on a CPU in float32 without gradients (`library_for`). Of one sequence it computes the same whatever is
beside it. Legend: B batch, T frames, S places of a frame, N tokens, L text tokens, C channels, A heads, D channels of a
head.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from arlon_ray import native

#: Multiplications of attention, or numbers, that are enough for a thread.
_ENOUGH = 2**18


class _Sequences(ctypes.Structure):
    """As in dit.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("outers", "inners", "outer", "step", "tokens")]


def library_for(x: Tensor, heads: int = 1) -> ctypes.CDLL | None:
    """The library, if it computes what torch would for x [., C] of so many heads, and nobody looks on as torch does."""
    plain = x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_grad_enabled()
    whole = x.shape[-1] % (heads * native.LANES) == 0
    if not plain or not whole or torch.compiler.is_compiling() or _len_torch_dispatch_stack():
        return None
    if torch.is_autocast_enabled("cpu"):  # what x meets may be in half precision
        return None
    return native.library()


def modulated(
    built: ctypes.CDLL, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift; with a gate: x + gate · that.

    x [.., C]; shift, scale and gate [F, C] with channels one behind the other: each row is that of as many tokens.
    """
    x = x.contiguous()
    out, count, channels = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
    assert shift.stride(-1) == scale.stride(-1) == 1 and (gate is None or gate.stride(-1) == 1)
    built.modulated(
        native.address(x), count, channels, eps, count // len(shift), shift.data_ptr(), shift.stride(0),
        scale.data_ptr(), scale.stride(0), None if gate is None else gate.data_ptr(),
        0 if gate is None else gate.stride(0), native.address(out), native.threads(8 * x.numel(), _ENOUGH),
    )  # fmt: skip
    return out


def gelu_in_place(built: ctypes.CDLL, x: Tensor) -> Tensor:
    """GELU with tanh of x [.., C], C a multiple of 8."""
    built.gelu_in_place(native.address(x), x.numel(), native.threads(32 * x.numel(), _ENOUGH))
    return x


def self_attention(
    built: ctypes.CDLL,
    qkv: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    over_time: bool = False,
) -> Tensor:
    """Attention of queries, keys and values [B, N, S, 3·C]: within each [S], or over time within each [N] of a place.

    `norms`: weights [D] of the RMS norms of queries and keys. `rotary`: cosines and sines [S or N, D]. [B, N, S, C].
    """
    qkv = qkv.contiguous()
    batch, frames, places, width = qkv.shape
    out, tokens = qkv.new_empty(batch, frames, places, width // 3), frames if over_time else places
    if over_time:
        sequences = _Sequences(batch, places, frames * places, places, frames)
    else:
        sequences = _Sequences(batch * frames, 1, places, 1, places)
    queries, keys = (native.address(weight) for weight in norms) if norms else (None, None)
    cos, sin = (native.address(part) for part in rotary) if rotary else (None, None)
    built.self_attention(
        native.address(qkv), ctypes.byref(sequences), heads, width // 3 // heads, queries, keys, eps, cos, sin,
        native.address(out), native.threads(2 * out.numel() * tokens, _ENOUGH),
    )  # fmt: skip
    return out


def cross_attention(
    built: ctypes.CDLL, q_BNC: Tensor, keys_BALD: Tensor, values_BALD: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Attention of [B, N, C] to the first of each sample's keys and values. [B, N, C]."""
    q_BNC, keys_BALD, values_BALD = q_BNC.contiguous(), keys_BALD.contiguous(), values_BALD.contiguous()
    (batch, tokens, _), (_, heads, length, channels) = q_BNC.shape, keys_BALD.shape
    out, real = torch.empty_like(q_BNC), torch.tensor(lengths)
    built.cross_attention(
        native.address(q_BNC), batch, tokens, heads, channels, native.address(keys_BALD), native.address(values_BALD),
        length, native.address(real), native.address(out), native.threads(2 * q_BNC.numel() * max(lengths), _ENOUGH),
    )  # fmt: skip
    return out
