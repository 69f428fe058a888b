"""The AR's step in two calls of C++ (`arlon_ray/native/ar.cpp`): the transformer on one more position of each row, and
the next block of each member, token by token.

Legend: R rows, Q members, C channels, k tokens of a block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arlon_ray import native
from arlon_ray.generation.products import Norm, Products
from arlon_ray.models.ar import ArBlock, ArTransformer, KeyValueCache

#: Multiplications that are enough for a thread which waits for the others several times a layer.
_ENOUGH = 2**22
_WEIGHTS = ("qkv", "proj", "gate_up", "down")
_TENSORS = ("before_attention", "before_mlp", "of_heads", "keys", "values")
#: What the head reads of the decoder's buffers, and the last of which it fills.
_BUFFERS = ("owners", "first", "away", "scale", "temperature", "top_k", "top_p", "fine")


class _Layer(ctypes.Structure):
    """As in ar.cpp."""

    _fields_ = [*((name, native.Weights) for name in _WEIGHTS), *((name, ctypes.c_void_p) for name in _TENSORS)]


class _Trunk(ctypes.Structure):
    """As in ar.cpp."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("count", "heads", "head_channels", "hidden", "positions")),
        *((name, ctypes.c_float) for name in ("eps", "eps_of_heads")),
        *((name, ctypes.c_void_p) for name in ("turns", "filled", "visible")),
    ]


class NativeTrunk:
    """What `Trunk` computes with `AttentionByRuns`. What it reads and fills are the decoder's buffers."""

    def __init__(
        self, built: ctypes.CDLL, model: ArTransformer, products: Products, cache: KeyValueCache,
        turns: Tensor, filled: Tensor, visible: Tensor,
    ) -> None:  # fmt: skip
        self._built, heads = built, model.config.heads
        self._held: list[Tensor | native.Panels] = [cache.values, turns, filled, visible]
        blocks: list[ArBlock] = list(model.blocks)  # type: ignore[arg-type]
        layers = (_Layer * len(blocks))()
        for layer, block, (keys, values) in zip(layers, blocks, cache.values, strict=True):
            of_heads = Norm(torch.stack([block.q_norm.weight, block.k_norm.weight]), block.q_norm.eps)
            norms = Norm.of(block.attention_norm), Norm.of(block.mlp_norm), of_heads
            weights = [products.panels(getattr(block, name), in_turns=name == "gate_up") for name in _WEIGHTS]
            for name, panels in zip(_WEIGHTS, weights, strict=True):
                setattr(layer, name, panels.weights)
            tensors = [*(norm.weight for norm in norms), keys, values]
            for name, tensor in zip(_TENSORS, tensors, strict=True):
                setattr(layer, name, native.address(tensor))
            self._held += [*weights, *tensors]
        self._of_a_layer = sum(panels.numbers.numel() for panels in weights)
        self._numbers = _Trunk(
            layers, len(blocks), heads, model.config.dim // heads, blocks[0].down.weight.shape[1], turns.shape[1],
            norms[0].eps, of_heads.eps, native.address(turns), native.address(filled), native.address(visible),
        )  # fmt: skip

    def __call__(self, x_RC: Tensor) -> Tensor:
        """[R, C], in place, of the first R rows."""
        threads = native.threads(len(x_RC) * self._of_a_layer, _ENOUGH)
        self._built.trunk(ctypes.byref(self._numbers), native.address(x_RC), len(x_RC), threads)
        return x_RC


class _Head(ctypes.Structure):
    """As in ar.cpp."""

    _fields_ = [
        *((name, native.Weights) for name in ("logits", "gate_up", "down")),
        ("before", ctypes.POINTER(native.Weights)),
        *((name, ctypes.c_void_p) for name in ("before_logits", "before_mlp", "place", "codes")),
        *((name, ctypes.c_int64) for name in ("channels", "hidden", "codes_count", "size")),
        *((name, ctypes.c_float) for name in ("eps", "eps_of_mlp")),
        *((name, ctypes.c_void_p) for name in _BUFFERS),
    ]


class NativeHead:
    """What `Decoder.draw` computes. The `buffers` are the decoder's, as `_BUFFERS` names them."""

    def __init__(self, built: ctypes.CDLL, model: ArTransformer, products: Products, buffers: Sequence[Tensor]) -> None:
        self._built, inside, norm = built, model.inside, Norm.of(model.norm)
        logits = products.panels(model.head)
        self._numbers = _Head(
            logits=logits.weights, before_logits=native.address(norm.weight), codes=native.address(model.codes.weight),
            channels=model.config.dim, codes_count=model.codebook_size, size=1, eps=norm.eps,
        )  # fmt: skip
        self._held: list[Any] = [logits, norm, model.codes.weight, buffers]
        if inside is not None:
            before_mlp, place = Norm.of(inside.norm), inside.place.detach()
            gate_up, down = products.panels(inside.gate_up, in_turns=True), products.panels(inside.down)
            before = [products.panels(layer) for layer in inside.before]  # type: ignore[arg-type]
            weights = (native.Weights * max(1, len(before)))(*(panels.weights for panels in before))
            for name, value in {
                "gate_up": gate_up.weights, "down": down.weights, "before": weights, "eps_of_mlp": before_mlp.eps,
                "before_mlp": native.address(before_mlp.weight), "place": native.address(place), "size": len(place),
                "hidden": inside.down.weight.shape[1],
            }.items():  # fmt: skip
                setattr(self._numbers, name, value)
            self._held += [before_mlp, place, gate_up, down, *before, weights]
        for name, buffer in zip(_BUFFERS, buffers, strict=True):
            setattr(self._numbers, name, native.address(buffer))
        self._of_a_token = sum(panels.numbers.numel() for panels in self._held if isinstance(panels, native.Panels))

    def __call__(self, state_RC: Tensor, numbers_Qk: Tensor, inner_Qk: Tensor) -> Tensor:
        """Tokens [Q, k] of each member's next block, `codebook_size` beyond the grid, from the trunk's output."""
        used_up, (members, size) = state_RC.clone(), numbers_Qk.shape
        drawn = torch.empty(members, size, dtype=torch.long)
        self._built.block(
            ctypes.byref(self._numbers), native.address(used_up), len(used_up), members, native.address(numbers_Qk),
            native.address(inner_Qk), native.address(drawn), native.threads(len(used_up) * self._of_a_token, _ENOUGH),
        )  # fmt: skip
        return drawn


class NativeStep(NamedTuple):
    """The two calls."""

    trunk: NativeTrunk
    head: NativeHead


def native_step(
    model: ArTransformer,
    products: Products,
    cache: KeyValueCache,
    of_rows: Sequence[Tensor],
    of_members: Sequence[Tensor],
) -> NativeStep | None:
    """None where there is no library (it says so), and for heads that are not whole registers wide.

    `of_rows`: turns, filled and visible, as `NativeTrunk` has them; `of_members`: as `NativeHead` has them.
    """
    if products.native is None or (model.config.dim // model.config.heads) % native.LANES:
        return None
    trunk = NativeTrunk(products.native, model, products, cache, *of_rows)
    return NativeStep(trunk, NativeHead(products.native, model, products, of_members))
