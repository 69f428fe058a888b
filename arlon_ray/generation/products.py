"""Products with a model's weights for a few rows at a time, fast, and such that a row's bits do not depend on others.

On a CPU in float32 the weights are laid out again, in panels (`native`: of bf16 and int8 too) or, where that cannot be
built, as oneDNN has them: products of few rows are then as fast as the memory, and a row is summed in the same order
whatever is beside it. That needs the weights' memory once more; frozen weights are laid out once, for all that use
them. Elsewhere the plain product stands; on a CPU that takes whole units of rows, for one row or two are summed by
other kernels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from arlon_ray import native
from arlon_ray.models.layers import RMSNorm
from arlon_ray.models.quantised import Int8Linear

#: Rows come in multiples of this where weights are not laid out again.
UNIT = 4
#: The rows that the layout is made for; it holds for any number.
_LAID_OUT_FOR = 16

#: Frozen weights: by how they are laid out, where they lay and in which version, and laid out.
_FROZEN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

T = TypeVar("T")
Product = Callable[..., Tensor]
Layout = Callable[[Tensor, Tensor | None], T]  # of weights and, of int8, their scales


class Norm:
    """`RMSNorm` over the last axis, of D channels, with fewer operations: x · rsqrt(Σx² + D·eps) · (√D · weight)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        channels = weight.shape[-1]
        self.weight, self.eps = weight.detach().float() * channels**0.5, eps * channels

    @classmethod
    def of(cls, norm: RMSNorm) -> Norm:
        """The same as this one, with its weight as it is now."""
        return cls(norm.weight, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide * wide).sum(-1, keepdim=True).add_(self.eps).rsqrt_() * self.weight).to(x.dtype)


class Products:
    """Makes `Product`s of the layers of one model: f(x [R, C]) or f(x, added [R, O]), both [R, O]."""

    def __init__(self, weight: Tensor) -> None:
        on_cpu = weight.device.type == "cpu"
        in_float32 = on_cpu and weight.dtype == torch.float32
        self.native = native.library() if in_float32 else None
        self.lays_out = in_float32 and (self.native is not None or torch.backends.mkldnn.is_available())
        self.unit = UNIT if on_cpu and not self.lays_out else 1

    def whole(self, rows: int) -> int:
        """So many rows in whole units."""
        return -(-rows // self.unit) * self.unit

    def of(self, linear: nn.Linear | Int8Linear, norm: Norm | None = None) -> Product:
        """The product with this layer's weight, as it is now, of what is normed before. The layer has no bias."""
        if self.native is not None:
            return _of_panels(self.native, self.panels(linear), len(linear.weight), norm)
        product = self._without_norm(linear)
        return product if norm is None else lambda x, added=None: product(norm(x), added)

    def _without_norm(self, linear: nn.Linear | Int8Linear) -> Product:
        if not self.lays_out:
            return _plain(
                linear if isinstance(linear, Int8Linear) else partial(F.linear, weight=linear.weight.detach())
            )
        return _of_onednn(_laid_out(linear, _for_onednn))

    def panels(self, linear: nn.Linear | Int8Linear, in_turns: bool = False) -> native.Panels:
        """This layer's weight as it is now; `in_turns`: see `native.in_turns`."""
        assert self.native is not None
        return _laid_out(linear, _as_panels_in_turns if in_turns else _as_panels)


def _plain(linear: Callable[[Tensor], Tensor]) -> Product:
    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = linear(x)
        return y if added is None else y.add_(added)

    return product


def _for_onednn(weight: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        weight = weight.to(scale.dtype) * scale[:, None]
    return torch.ops.mkldnn._reorder_linear_weight(weight, _LAID_OUT_FOR)


def _as_panels(weight: Tensor, scale: Tensor | None) -> native.Panels:
    built = native.library()
    assert built is not None
    return native.Panels(built, weight, scale)


def _as_panels_in_turns(weight: Tensor, scale: Tensor | None) -> native.Panels:
    return _as_panels(native.in_turns(weight), None if scale is None else native.in_turns(scale))


def _laid_out(linear: nn.Linear | Int8Linear, how: Layout[T]) -> T:
    """Again each time for weights that are trained: not all that changes them tells (`.data` does not)."""
    weight, scale = linear.weight, linear.scale if isinstance(linear, Int8Linear) else None
    if weight.requires_grad or weight.is_inference():
        return how(weight.detach(), scale)
    state, known = (weight.data_ptr(), weight._version), _FROZEN.setdefault(weight, {})
    if how not in known or known[how][0] != state:
        known[how] = state, how(weight, scale)
    return known[how][1]


def _of_panels(built: ctypes.CDLL, panels: native.Panels, outputs: int, norm: Norm | None) -> Product:
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        return native.product(built, x, panels, outputs, added, weight, eps)

    return product


def _of_onednn(packed: Tensor) -> Product:
    alone, with_added = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        if len(x) == 1:  # with AVX-512 one row of many inputs is summed in another order than several
            return product(x.expand(2, -1), None if added is None else added.expand(2, -1))[:1]
        if added is None:
            return alone(x, packed, None, "none", [], "")
        return with_added(x, added, packed, None, "add")

    return product
