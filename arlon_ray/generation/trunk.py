"""The transformer of the AR on one more position of each row: what `ArBlock` computes, with few and large operations.

How rows attend to what is cached is another's part (`Attention`): runs of rows that are equally far (on a CPU, where
the numbers are known), or an index on the device (where nothing may wait for the host, and a graph is captured).

Legend: R rows, A heads, D channels a head, C = A · D, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.generation.products import Norm, Products
from arlon_ray.models.ar import ArBlock, ArTransformer, KeyValueCache, Rotary


class Attention(Protocol):
    """Stores one more position of each row and attends to those that are filled."""

    def __call__(self, layer: int, q_RAD: Tensor, k_RAD: Tensor, v_RAD: Tensor) -> Tensor:
        """[R, C]."""


class AttentionByRuns:
    """`runs` are (first row, end, filled positions): rows of a run attend to just as many positions, without a mask
    but for the text's. So a row's sums are the same whatever is beside it, and nothing is read that is not filled.

    `unseen` is 0 or −inf [rows, P], None: all is seen.
    """

    def __init__(self, cache: KeyValueCache, runs: Sequence[tuple[int, int, int]], unseen: Tensor | None) -> None:
        self._values, self._runs, self._unseen = cache.values, runs, unseen

    def __call__(self, layer: int, q_RAD: Tensor, k_RAD: Tensor, v_RAD: Tensor) -> Tensor:
        """See Attention. Rows beyond the last run get zeros."""
        parts = []
        for first, end, filled in self._runs:
            keys, values = self._values[layer, :, first:end]
            keys[:, :, filled] = k_RAD[first:end]
            values[:, :, filled] = v_RAD[first:end]
            count = filled + 1
            mask = None if self._unseen is None else self._unseen[first:end, None, None, :count]
            parts.append(
                F.scaled_dot_product_attention(
                    q_RAD[first:end, :, None], keys[:, :, :count], values[:, :, :count], attn_mask=mask
                )
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        missing = len(q_RAD) - len(attended)
        return (F.pad(attended, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else attended).flatten(1)


class AttentionByIndex:
    """Each row's place stands on the device: `filled` [R]. All rows read the first `count` positions, as far as they
    are `visible` [rows, P] and filled.
    """

    def __init__(self, cache: KeyValueCache, filled_R: Tensor, visible: Tensor, count: int) -> None:
        self.values, self.filled, self.visible, self.count = cache.values, filled_R, visible, count

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.filled), device=self.filled.device)

    @cached_property
    def _mask(self) -> Tensor:
        behind = torch.arange(self.count, device=self.filled.device) <= self.filled[:, None]
        return (self.visible[: len(self.filled), : self.count] & behind)[:, None, None]

    def __call__(self, layer: int, q_RAD: Tensor, k_RAD: Tensor, v_RAD: Tensor) -> Tensor:
        """See Attention."""
        keys, values = self.values[layer]
        keys[self._rows, :, self.filled], values[self._rows, :, self.filled] = k_RAD, v_RAD
        rows, count = len(q_RAD), self.count
        return F.scaled_dot_product_attention(
            q_RAD[:, :, None], keys[:rows, :, :count], values[:rows, :, :count], attn_mask=self._mask
        ).flatten(1)


def turns(rotary: Rotary) -> Tensor:
    """Rotations as complex numbers [P, 2 (of queries, of keys), D/2]: those of the channel pairs (2i, 2i+1)."""
    cos, sin = (torch.stack(part, 1)[..., ::2] for part in zip(rotary.query, rotary.key, strict=True))
    return torch.complex(cos.float().contiguous(), sin.float().contiguous())


class _Layer:
    def __init__(self, block: ArBlock, products: Products) -> None:
        self.qkv, self.proj = products.of(block.qkv), products.of(block.proj)
        self.gate_up, self.down = products.of(block.gate_up), products.of(block.down)
        self.before_attention, self.before_mlp = Norm.of(block.attention_norm), Norm.of(block.mlp_norm)
        self.of_heads = Norm(torch.stack([block.q_norm.weight, block.k_norm.weight])[:, None], block.q_norm.eps)
        self.heads = block.heads

    def __call__(self, layer: int, x: Tensor, turns_R1: Tensor, attention: Attention) -> Tensor:
        qkv = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        qk = self.of_heads(qkv[:, :2])
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        q, k = torch.view_as_real(pairs * turns_R1).flatten(-2).to(x.dtype).unbind(1)
        x = self.proj(attention(layer, q, k, qkv[:, 2]), x)
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, -1)
        return self.down(F.silu(gate).mul_(up), x)


class Trunk:
    """All blocks of a model, with its weights as they are now."""

    def __init__(self, model: ArTransformer, products: Products) -> None:
        self._layers = [_Layer(block, products) for block in model.blocks]  # type: ignore[arg-type]

    def __call__(self, x_RC: Tensor, turns: Tensor, at_R: Tensor, attention: Attention) -> Tensor:
        """[R, C] to [R, C]. The new position of each row is turned by `turns` [rows, P, 2, D/2], flat, at `at_R`."""
        turned = turns.flatten(0, 1)[at_R][:, :, None]
        for number, layer in enumerate(self._layers):
            x_RC = layer(number, x_RC, turned, attention)
        return x_RC
