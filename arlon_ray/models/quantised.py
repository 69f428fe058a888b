"""Weights as 8-bit integers, for GPUs that do not hold them otherwise (weight-only int8, symmetric, by output channel).

w ≈ scale · round(w / scale) with scale = max|w| / 127 of an output channel: half the memory of bf16, a quarter of
float32. Activations and sums keep their precision: y = scale · (round(w / scale) x). (LLM.int8(), Dettmers et al. 2022,
without its outliers. torchao's Int8WeightOnly is the same arithmetic; but transformers imports an installed torchao
whenever it loads a text encoder: seconds, and lines of warnings, on every command.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 127


class Int8Linear(nn.Module):
    """A linear layer with int8 weights [out, in] and a scale [out] for each output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale[:, 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def in_full(self) -> Tensor:
        """The weights [out, in] that the integers stand for."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out] in the type of `x`."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantise(model: nn.Module) -> nn.Module:
    """The linear layers of the model's blocks (`block_lists`) as `Int8Linear`, in place.

    What comes before and behind the blocks stays: it is small, and every error in it reaches everything.
    """
    for name in getattr(model, "block_lists", ()):
        for module in list(getattr(model, name).modules()):
            for child, layer in list(module.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(module, child, Int8Linear(layer))
    return model


def weight_bytes(model: nn.Module) -> int:
    """What the model's parameters and buffers take in memory."""
    return sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])
