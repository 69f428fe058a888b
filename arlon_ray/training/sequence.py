"""Sequence parallelism of the DiT over the ranks of a group (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv 2309.14509).

Every rank holds some frames of the same samples. What looks at one frame (spatial attention, cross-attention, MLP,
norms) needs nobody else; attention over time exchanges: each rank gets all frames for some of the heads, and gives them
back. The frames come together once, at the model's output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class SequenceParallel:
    """The frames' shares. Gradients of parameters are meant to be averaged over all ranks, as data parallelism does."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal share along `dim`, which is filled up with zeros where it cannot be divided."""
        missing = -x.shape[dim] % self.size
        if missing:
            x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])
        return x.chunk(self.size, dim)[self.rank]

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All shares, without what filled them up: `length` along `dim`."""
        return _Gather.apply(x, dim, self).narrow(dim, 0, length)

    def to_heads(self, x_BAND: Tensor) -> Tensor:
        """[B, A, N, D] of this rank's tokens to [B, A/size, N·size, D]: all tokens for some heads.

        Raises ValueError if the heads cannot be shared out evenly.
        """
        if x_BAND.shape[1] % self.size:
            raise ValueError(f"{x_BAND.shape[1]} heads cannot be split evenly over {self.size} ranks")
        return _Exchange.apply(x_BAND, 1, 2, self)

    def to_tokens(self, x_BAND: Tensor) -> Tensor:
        """What `to_heads` did, undone."""
        return _Exchange.apply(x_BAND, 2, 1, self)


def _exchanged(x: Tensor, scatter: int, gather: int, parallel: SequenceParallel) -> Tensor:
    parts = torch.stack(x.chunk(parallel.size, scatter))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=parallel.group)
    return torch.cat(received.unbind(0), gather)


class _Exchange(torch.autograd.Function):
    """Give the other ranks their shares along `scatter`; put what they give together along `gather`."""

    @staticmethod
    def forward(context: Any, x: Tensor, scatter: int, gather: int, parallel: SequenceParallel) -> Tensor:
        context.axes = scatter, gather, parallel
        return _exchanged(x, scatter, gather, parallel)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scatter, gather, parallel = context.axes
        return _exchanged(gradient, gather, scatter, parallel), None, None, None


class _Gather(torch.autograd.Function):
    """All ranks' shares along an axis; the gradient of one's own share, `size` times as large.

    All ranks compute the same loss, and each has of a parameter's gradient what its frames give: the sum is wanted,
    and gradients are averaged.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, dim: int, parallel: SequenceParallel) -> Tensor:
        context.axes = dim, parallel
        parts = [torch.empty_like(x) for _ in range(parallel.size)]
        dist.all_gather(parts, x.contiguous(), group=parallel.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dim, parallel = context.axes
        return gradient.chunk(parallel.size, dim)[parallel.rank] * parallel.size, None, None
