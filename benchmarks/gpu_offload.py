"""What it costs, and saves, to let a bundle's idle parts wait in the CPU's memory (`arlon_ray.offload`)."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from arlon_ray.config import load_config
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.offload import Offload
from benchmarks.gpu_sampling import WITHOUT_OPENCV, random_bundle
from benchmarks.gpu_training import clean
from benchmarks.machine import synchronised, timed

#: The `small` preset with an AR of 1 B and STDiT3-XL/2's DiT: parts as large as those that a small GPU cannot hold.
LARGE = (
    "ar.dim=2048", "ar.layers=16", "ar.heads=16", "dit.depth=28", "dit.hidden_size=1152", "dit.num_heads=16",
    "video.height=256", "video.width=256",
)  # fmt: skip
FEW = ("video.height=32", "video.width=32", "dit.depth=1", "ar.layers=1")
PARTS = ("ar", "dit", "vae", "codec")


def offloaded(device: str, small: bool) -> dict[str, Any]:
    """A video of two segments, made with all parts on the device and with idle ones in the CPU's memory.

    In MiB: `weights`, what torch holds between two videos, and its peak while one is made (a GPU's).
    """
    config = load_config("small", FEW if small else LARGE)
    options = default_options(config.sampling, **WITHOUT_OPENCV, steps=1 if small else 8)
    prompts, found, sums = ["a red circle moves", "and comes back"], dict[str, Any](), list[list[int]]()
    kinds: tuple[Offload, ...] = ("none", "idle")
    for kind in kinds:
        with clean(device):
            torch.manual_seed(0)
            generator, made = VideoGenerator(random_bundle(config, device, kind)), list[np.ndarray]()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()  # random weights were float32 first

            def make(generator: VideoGenerator = generator, made: list[np.ndarray] = made) -> None:
                torch.manual_seed(0)  # captions' values are drawn
                made[:] = generator.generate(prompts, 0, options)

            seconds, idle = timed(synchronised(make, device), 1 if small else 2), _allocated(device)
            found[kind] = {"video_s": seconds, "idle_mib": idle, "peak_mib": _allocated(device, most=True)}
            weights = {name: _mib(getattr(generator.bundle, name)) for name in PARTS}
        sums.append([int(part.sum(dtype=np.int64)) for part in made])
    return {"weights_mib": weights, "equal": sums[0] == sums[1], **found}


def _allocated(device: str, most: bool = False) -> float | None:
    if device != "cuda":
        return None
    return (torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()) / 2**20


def _mib(model: nn.Module) -> float:
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers())) / 2**20
