"""Seconds of attention at the sizes of STDiT3-XL/2, by each of torch's kernels. A case of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from arlon_ray.models.layers import RotaryEmbedding
from arlon_ray.models.over_time import TOLERANCES, attention_over_time, error_against_plain
from benchmarks.machine import synchronised, timed

HEADS, HEAD_DIM = 16, 72
#: name: (batch, queries, keys). Space: each frame; time: each place; text: all tokens.
SHAPES = {
    "space, 240p": (60, 405, 405),
    "space, 720p": (15, 3600, 3600),
    "time, 240p": (1620, 15, 15),
    "time, 720p": (3600, 15, 15),
    "text, 720p": (1, 54000, 300),
}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
#: Scores beyond which the kernels that write them out are not tried.
MOST_SCORES = 2e8


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores written out, as on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q * HEAD_DIM**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def _with(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):  # in the order in which a projection gives them
            return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return attend


def attention_kernels(device: str, small: bool) -> dict[str, Any]:
    """Seconds of a forward pass, and of forward and backward, in bf16, and the speed of the latter."""
    found: dict[str, Any] = {}
    for name, (batch, queries, keys) in SHAPES.items():
        if small:
            batch, queries, keys = 2, 8, 8
        shapes = [(batch, count, HEADS, HEAD_DIM) for count in (queries, keys, keys)]
        leaves = [torch.randn(s, device=device, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        flops = 4 * batch * HEADS * queries * keys * HEAD_DIM
        works: dict[str, Callable[..., Tensor]] = {kernel: _with(its) for kernel, its in KERNELS.items()}
        works["products"] = products
        for kernel, work in works.items():
            if kernel in ("math", "products") and batch * HEADS * queries * keys > MOST_SCORES:
                continue
            found.setdefault(name, {})[kernel] = _measured(work, leaves, flops, device)
        if device == "cuda" and name.startswith("time"):
            found[name] |= _ours(batch, queries, flops, device)
    return found


def _ours(sequences: int, frames: int, flops: int, device: str) -> dict[str, Any]:
    """Our kernel, with norms and rotations that the others leave to others, by the warps of a program.

    `errors`: of what comes out and of all gradients, against plain operations, relative.
    """
    from arlon_ray.models import over_time_kernels

    qkv = torch.randn(1, frames, sequences, 3 * HEADS * HEAD_DIM, device=device)
    norms = torch.rand(HEAD_DIM, device=device) + 0.5, torch.rand(HEAD_DIM, device=device) + 0.5
    rotary = RotaryEmbedding(HEAD_DIM).to(device).angles(torch.arange(frames, device=device))
    work = partial(attention_over_time, norms=norms, eps=1e-6, rotary=rotary)
    errors = {str(dtype): error_against_plain(device, frames, HEAD_DIM, dtype) for dtype in TOLERANCES}
    found: dict[str, Any] = {"errors": errors}
    usual, halves = over_time_kernels.WARPS, qkv.bfloat16().requires_grad_()
    for warps in (1, 2, 4, 8):
        over_time_kernels.WARPS = warps
        found[f"ours, {warps} warps"] = _measured(work, [halves], flops, device)
    over_time_kernels.WARPS = usual
    return found


def _measured(work: Callable[..., Tensor], leaves: list[Tensor], flops: int, device: str) -> dict[str, Any]:
    asked: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            asked[:] = [work(*leaves)]

    def both() -> None:
        torch.autograd.grad(work(*leaves), leaves, asked)

    try:
        alone = timed(synchronised(forward, device), 5)["min"]
        seconds = timed(synchronised(both, device), 5)["min"]
        return {
            "forward_s": alone,
            "both_s": seconds,
            "tflops_per_s": 3 * flops / seconds / 1e12,
        }
    except RuntimeError as error:  # a kernel that cannot do it says so in this way
        return {"error": str(error).splitlines()[0][:120]}
