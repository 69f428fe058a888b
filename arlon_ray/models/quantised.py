"""Linear layers with weights in fewer bits: int8, and bfloat16 for a CPU's products.

**int8** is for GPUs that do not hold the weights otherwise (weight-only, symmetric, by output channel); on a CPU the AR
reads them faster (`arlon_ray.native`).

w ≈ scale · round(w / scale) with scale = max|w| / 127 of an output channel: half the memory of bf16, a quarter of
float32. Activations and sums keep their precision: y = scale · (round(w / scale) x). (LLM.int8(), Dettmers et al. 2022,
without its outliers. torchao's Int8WeightOnly is the same arithmetic; but transformers imports an installed torchao
whenever it loads a text encoder: seconds, and lines of warnings, on every command.)

**bfloat16 on a CPU** that has it: products in half the time or less, of activations that stay float32. What is between
the products (norms, attention, the sum of the layers) then keeps its precision, and its C++ (`arlon_ray.native.dit`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _len_torch_dispatch_stack

LEVELS = 127


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in] and a scale [out] for each output channel.

    `products_in`: the type that products are made in (None: that of what comes in).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, products_in: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._products_in = products_in
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out] in the type of `x`."""
        dtype = self._products_in or x.dtype
        y = F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype) * self.scale
        return y if self.bias is None else y + self.bias


class Bf16Linear(nn.Module):
    """A linear layer [out, in] of float32 activations whose products a CPU makes in bfloat16, with sums of float32.

    The weights are laid out once more, for some hundred rows (any number will do), when they are first used.
    """

    ROWS = 256
    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach().bfloat16())
        self.register_buffer("bias", None if bias is None else bias.detach().bfloat16())
        self._laid_out: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out], both float32."""
        if _len_torch_dispatch_stack():  # whoever counts operations knows none of oneDNN's
            return F.linear(x.bfloat16(), self.weight, self.bias).float()
        if self._laid_out is None:
            self._laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight, self.ROWS)
        product = torch.ops.mkldnn._linear_pointwise.default
        return product(x.bfloat16(), self._laid_out, self.bias, "none", [], "").float()

    def __getstate__(self) -> dict[str, object]:
        """What oneDNN has laid out can neither be copied nor stored."""
        return {**super().__getstate__(), "_laid_out": None}


def quantise(model: nn.Module, products_in: torch.dtype | None = None) -> nn.Module:
    """The linear layers of the model's blocks as `Int8Linear`, in place; see `_replace`."""
    return _replace(model, partial(Int8Linear, products_in=products_in))


def in_bf16(model: nn.Module) -> nn.Module:
    """The linear layers of the model's blocks as `Bf16Linear`, in place, on a CPU that has bfloat16; see `_replace`."""
    return _replace(model, Bf16Linear)


def _replace(model: nn.Module, by: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace the linear layers of the model's blocks (`block_lists`).

    What comes before and behind the blocks stays: it is small, and every error in it reaches everything.
    """
    for name in getattr(model, "block_lists", ()):
        for module in list(getattr(model, name).modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(module, child, by(layer))
    return model


def weight_bytes(model: nn.Module) -> int:
    """What the model's parameters and buffers take in memory."""
    return sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])
