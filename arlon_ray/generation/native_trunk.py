"""The AR's transformer on one more position of each row in one call of C++ (`arlon_ray/native/ar.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from arlon_ray import native
from arlon_ray.generation.products import Norm, Products
from arlon_ray.models.ar import ArBlock, ArTransformer, KeyValueCache

_WEIGHTS = ("qkv", "proj", "gate_up", "down")
_TENSORS = ("before_attention", "before_mlp", "of_heads", "keys", "values")


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
        threads = native.threads(len(x_RC) * self._of_a_layer, 2**22)  # that wait five times a layer
        self._built.trunk(ctypes.byref(self._numbers), native.address(x_RC), len(x_RC), threads)
        return x_RC


def native_trunk(
    model: ArTransformer, products: Products, cache: KeyValueCache, turns: Tensor, filled: Tensor, visible: Tensor
) -> NativeTrunk | None:
    """None where there is no library (it says so), and for heads that are not whole registers wide."""
    if products.native is None or (model.config.dim // model.config.heads) % native.LANES:
        return None
    return NativeTrunk(products.native, model, products, cache, turns, filled, visible)
