"""Products with a model's weights for a few rows at a time, fast, and such that a row's bits do not depend on others.

On a CPU in float32 the weights are laid out again, in blocks (oneDNN): products of few rows are then as fast as the
memory, and a row is summed in the same order whatever is beside it. That needs the weights' memory once more; frozen
weights are laid out once, for all that use them. Elsewhere the plain product stands; on a CPU that takes whole units of
rows, for one row or two are summed by other kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from arlon_ray.models.quantised import Int8Linear

#: Rows come in multiples of this where weights are not laid out again.
UNIT = 4
#: The rows that the layout is made for; it holds for any number.
_LAID_OUT_FOR = 16

#: Frozen weights: where they lie and in which version, and laid out.
_FROZEN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Product = Callable[..., Tensor]


class Products:
    """Makes `Product`s of the layers of one model: f(x [R, C]) or f(x, added [R, O]), both [R, O]."""

    def __init__(self, weight: Tensor) -> None:
        on_cpu = weight.device.type == "cpu"
        self.lays_out = on_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        self.unit = UNIT if on_cpu and not self.lays_out else 1

    def whole(self, rows: int) -> int:
        """So many rows in whole units."""
        return -(-rows // self.unit) * self.unit

    def of(self, linear: nn.Linear | Int8Linear) -> Product:
        """The product with this layer's weight, as it is now. The layer has no bias."""
        if isinstance(linear, Int8Linear):
            return _product_of_laid_out(linear.in_full()) if self.lays_out else _of_layer(linear)
        return _product_of_laid_out(linear.weight) if self.lays_out else _plain(linear.weight.detach())


def _plain(weight: Tensor) -> Product:
    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight)
        return y if added is None else y.add_(added)

    return product


def _of_layer(layer: nn.Module) -> Product:
    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        y = layer(x)
        return y if added is None else y.add_(added)

    return product


def _laid_out(weight: Tensor) -> Tensor:
    """Again each time for weights that are trained: not all that changes them tells (`.data` does not)."""
    if weight.requires_grad or weight.is_inference():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _LAID_OUT_FOR)
    state = weight.data_ptr(), weight._version
    known = _FROZEN.get(weight)
    if known is None or known[0] != state:
        _FROZEN[weight] = known = state, torch.ops.mkldnn._reorder_linear_weight(weight, _LAID_OUT_FOR)
    return known[1]


def _product_of_laid_out(weight: Tensor) -> Product:
    packed = _laid_out(weight)
    alone, with_added = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary

    def product(x: Tensor, added: Tensor | None = None) -> Tensor:
        if added is None:
            return alone(x, packed, None, "none", [], "")
        return with_added(x, added, packed, None, "add")

    return product
