"""Which arithmetic a device can do well."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
#: What a job says, once, where it computes otherwise than its configuration asks for.
NOTE = "this CPU has no bfloat16 arithmetic (it would be a hundred times slower): float32 is used instead of bf16"


@cache
def _cpu_has_bf16() -> bool:
    # oneDNN's own answer: AVX-512 or AMX on x86, BF16 on ARM; without it torch multiplies element by element
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


#: Of models that make videos: int8 is bf16 with weights of 8 bits; on a CPU see `Bundle.ar` and `Bundle.dit`.
Weights = Literal["fp32", "bf16", "int8"]


def falls_back(precision: Weights, device: torch.device | str) -> bool:
    """Whether bf16 is asked for on a CPU that has only emulation for it."""
    return precision != "fp32" and torch.device(device).type == "cpu" and not _cpu_has_bf16()


def arithmetic(precision: Weights, device: torch.device | str) -> torch.dtype:
    """The type to compute in: what `precision` asks for, but float32 where `falls_back`."""
    return torch.bfloat16 if precision != "fp32" and not falls_back(precision, device) else torch.float32


#: Dense bf16 operations a second, by a part of the GPU's name (makers' data sheets).
BF16_PEAKS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


def peak_flops_per_s(precision: Precision, device: torch.device | str) -> float | None:
    """What the device can do at best in this precision; None where that is not known."""
    if precision != "bf16" or torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)
