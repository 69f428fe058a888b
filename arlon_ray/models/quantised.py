"""Weights as 8-bit integers, for GPUs that do not hold them otherwise (torchao's weight-only int8).

What is stored is int8 with one scale for each output channel: w ≈ scale · round(w / scale), scale = max|w| / 127. It is
multiplied as what the input is: half the memory of bf16, a quarter of float32, and the arithmetic stays as precise.
"""

from __future__ import annotations

import logging
import warnings

from torch import nn

from arlon_ray.artifact import ArtifactError


def quantise(model: nn.Module) -> nn.Module:
    """The linear layers of the model's blocks (`block_lists`) with weights of 8 bits, in place.

    What comes before and behind the blocks stays: it is small, and every error in it reaches everything. Raises
    ArtifactError if torchao is not installed.
    """
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names every kernel that it was built without
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ArtifactError("precision=int8 needs torchao: pip install 'arlon-ray[int8]'") from None
    lists = tuple(f"{name}." for name in getattr(model, "block_lists", ()))
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith(lists),
    )
    return model


def weight_bytes(model: nn.Module) -> int:
    """What the model's parameters and buffers take in memory."""
    total = 0
    for value in [*model.parameters(), *model.buffers()]:
        parts = [value]
        if hasattr(value, "__tensor_flatten__"):
            parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
