"""Attention over time on a GPU: many short sequences, which the kernels for long ones fill to a hundredth.

A latent has as many sequences of 5 to 20 frames as it has places. One program takes a place and a head: it reads
queries, keys and values where the projection put them, norms and turns them, attends, and writes to where the output's
projection reads; backward it does all of it again from the same input. Nothing is copied into another order between.

Legend: B batch, T frames, S places of a frame, C channels, A heads, D channels of a head.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from logging import getLogger
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from arlon_ray.artifact import one_line

#: The most frames and channels of a head that one program has room for.
MOST_FRAMES, MOST_CHANNELS = 32, 128
#: How far the kernels may be from plain operations where they are tried, relative to the size of what comes out.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
_HAS_TRITON = find_spec("triton") is not None


def fits(x_BTSC: Tensor, channels: int) -> bool:
    """Whether `attention_over_time` computes x here, with so many channels a head: on a GPU where the kernels work, and
    short enough.

    Not where somebody counts operations: it would see one that it does not know.
    """
    short = x_BTSC.shape[1] <= MOST_FRAMES and channels <= MOST_CHANNELS and channels % 2 == 0
    if not (_HAS_TRITON and x_BTSC.is_cuda and short):
        return False
    watched = not torch.compiler.is_compiling() and _len_torch_dispatch_stack()
    return not watched and works(str(x_BTSC.device), channels)


def works(device: str, channels: int) -> bool:
    """Whether the kernels compile there and give what plain operations give; said once where they do not."""
    return _tried(device, channels)


# torch.compiler.assume_constant_result, whose import takes a second
works._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _tried(device: str, channels: int) -> bool:
    try:
        wrong = [
            str(dtype)
            for dtype, most in TOLERANCES.items()
            if not all(error_against_plain(device, frames, channels, dtype) < most for frames in (15, MOST_FRAMES))
        ]
        why = f"they are wrong in {', '.join(wrong)}" if wrong else ""
    except Exception as error:  # what Triton and its compilers raise is not said anywhere
        why = one_line(error)
    if why:
        getLogger(__name__).warning("attention over time without its Triton kernels on %s: %s", device, why)
    return not why


@torch.inference_mode(False)
@torch.enable_grad()
def error_against_plain(device: str, frames: int, channels: int, dtype: torch.dtype) -> float:
    """How far output and gradients of the kernels are from those of plain operations, the greater of both."""
    with torch.autocast(torch.device(device).type, enabled=False):

        def waves(*shape: int) -> Tensor:  # no random numbers: whoever draws them must get the same as without
            return torch.arange(math.prod(shape), device=device).mul(1.7).sin().view(shape)

        qkv, grad = waves(1, frames, 3, 3 * channels).requires_grad_(), waves(1, frames, 3, channels) + 0.3
        norms = [(1.2 + 0.3 * waves(channels)).requires_grad_() for _ in range(2)]
        angles = waves(frames, channels // 2).repeat_interleave(2, 1)
        rotary = angles.cos(), angles.sin()
        rounded = qkv.to(dtype)
        outs = [
            attention_over_time(rounded, (norms[0], norms[1]), 1e-6, rotary).float(),
            plain(rounded.float(), (norms[0], norms[1]), 1e-6, rotary),
        ]
        found, expected = ([out, *torch.autograd.grad(out, [qkv, *norms], grad, retain_graph=True)] for out in outs)
        return max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, expected, strict=True))


def plain(qkv_BTSC: Tensor, norms: tuple[Tensor, Tensor], eps: float, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`attention_over_time` by torch's operations."""
    from arlon_ray.models.layers import attend, rotate  # layers need this module

    q, k, v = qkv_BTSC.unflatten(-1, (3, -1, rotary[0].shape[1])).permute(3, 0, 2, 4, 1, 5)  # [3, B, S, A, T, D]
    q, k = (rotate(F.rms_norm(x, its.shape, its, eps), *rotary) for x, its in zip((q, k), norms, strict=True))
    return attend(q, k, v).permute(0, 3, 1, 2, 4).flatten(3)


def attention_over_time(
    qkv_BTSC: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """Attention within each of the B·S sequences of T frames: [B, T, S, C] of queries, keys and values [B, T, S, 3·C].

    `norms`: weights [D] of the RMS norms of queries and keys. `rotary`: cosines and sines [T, D]; D says how many heads
    there are.
    """
    cos, sin = (part.float() for part in rotary)
    assert cos.shape == sin.shape and len(cos) == qkv_BTSC.shape[1] and qkv_BTSC.shape[3] % (3 * cos.shape[1]) == 0
    queries, keys = norms or (None, None)
    attended: Tensor = _forward(qkv_BTSC, queries, keys, cos, sin, eps)
    return attended


@torch.library.custom_op(
    "arlon_ray::attention_over_time",
    mutates_args=(),
    schema="(Tensor qkv, Tensor? queries, Tensor? keys, Tensor cos, Tensor sin, float eps) -> Tensor",
)
def _forward(*inputs: Any) -> Tensor:
    from arlon_ray.models import over_time_kernels

    return over_time_kernels.forward(*inputs)


@_forward.register_fake
def _(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op(
    "arlon_ray::attention_over_time_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor? queries, Tensor? keys, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor, Tensor)",
)
def _backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from arlon_ray.models import over_time_kernels

    return over_time_kernels.backward(*inputs)


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, queries: Tensor | None, keys: Tensor | None, cos: Tensor, *_: Any) -> Any:
    return qkv.new_empty(qkv.shape), qkv.new_empty(2, cos.shape[1], dtype=torch.float32)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    qkv, queries, keys, cos, sin = ctx.saved_tensors
    d_qkv, d_norms = _backward(grad, qkv, queries, keys, cos, sin, ctx.eps)
    of_norms = (None, None) if queries is None else (d_norms[0].to(queries.dtype), d_norms[1].to(keys.dtype))
    return d_qkv, *of_norms, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
