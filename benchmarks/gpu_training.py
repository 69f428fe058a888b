"""What a GPU can do at best, and what forward and backward of STDiT3-XL/2 make of it. Cases of `benchmarks.gpu`.

The objective is that of the training (`DitObjective`: drawn times, noise, frames that are given), the blocks are
compiled and recomputed by the training's own functions; the batch is random. MFU counts the operations of forward and
backward, not those of blocks that are computed again (PaLM, Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from arlon_ray.config import Config, load_config, override
from arlon_ray.precision import BF16_PEAKS
from arlon_ray.training.engine import autocast, compile_blocks, recompute_blocks, trained_blocks
from arlon_ray.training.memory import step_flops
from arlon_ray.training.stages.dit import DitObjective, DitPaths, text_only
from benchmarks.machine import synchronised, timed

#: Bytes that a token of a layer keeps for the backward pass, over the hidden size: compiled, and in plain torch.
KEPT = {True: 50, False: 90}
#: Share of the memory that may be filled, and what is left for all that is not reckoned.
FILLED, SPARE = 0.85, 10e9


def setting(height: int, width: int, groups: int, small: bool) -> Config:
    """STDiT3-XL/2 with text alone, at one resolution; `small`: two layers of the same, for a test without a GPU."""
    changes = [
        f"video.height={height}", f"video.width={width}", f"segment.groups={groups}", "dit.training.batch_size=1",
        f"data.bucket_groups=[{groups}]",
    ]  # fmt: skip
    if small:
        changes += ["dit.depth=2", "dit.hidden_size=64", "dit.num_heads=4", "text.dim=32", "text.max_tokens=12"]
        changes += ["dit.caption_channels=32", "dit.model_max_length=12"]
    return text_only(load_config("opensora-v1.2", changes), 1)


@cache
def flops_of(height: int, width: int, groups: int, small: bool) -> float:
    """Operations of forward and backward of one sample; layers are alike, so that two of them say it for all."""
    config = setting(height, width, groups, small)
    one, two = (step_flops(override(config, [f"dit.depth={depth}"]), "dit") for depth in (1, 2))
    return one + (config.dit.depth - 1) * (two - one)


def measured_ceilings(device: str, small: bool) -> dict[str, Any]:
    """bf16 products of matrices and copies within the memory: the most that a program gets of this machine."""
    side, mib = (256, 8) if small else (8192, 4096)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(mib * 2**20, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    times = 1 if small else 20

    def often(work: Callable[[], Any]) -> float:
        return timed(synchronised(lambda: [work() for _ in range(times)], device), 3)["min"] / times

    product, copy = often(lambda: a @ b), often(lambda: target.copy_(source))
    return {
        "matmul_side": side,
        "matmul_tflops_per_s": 2 * side**3 / product / 1e12,
        "copy_gb_per_s": 2 * len(source) / copy / 1e9,
        "peak_tflops_per_s": peak(device) / 1e12,
    }


def peak(device: str) -> float:
    """Operations a second by the data sheet; 989 TFLOP/s (H100) for a GPU that is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return next((its for part, its in BF16_PEAKS.items() if part in name), 989e12)


def random_batch(config: Config, count: int, device: str) -> dict[str, Any]:
    """What a reader would give."""
    frames, length = config.segment.latents, config.text.max_tokens
    return {
        "latents": torch.randn(count, config.vae.latent_channels, frames, *config.latent_grid, device=device),
        "text": torch.randn(count, length, config.text.dim, device=device),
        "text_mask": torch.ones(count, length, dtype=torch.bool, device=device),
        "fps": torch.full((count,), config.video.fps, device=device),
    }


def free_bytes(device: str) -> float:
    """Memory that a case may fill."""
    return FILLED * torch.cuda.mem_get_info()[1] - SPARE if device == "cuda" else 4e6


@contextmanager
def clean(device: str) -> Iterator[None]:
    """Nothing is left behind in the GPU's memory, and nothing compiled."""
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


class TrainingStep:
    """Forward and backward of one objective at one size; parts of it may be compiled and recomputed."""

    def __init__(self, config: Config, device: str, weights: torch.dtype, compiled: bool) -> None:
        self.config, self.device, self.compiled = config, device, compiled
        training = config.dit.training.model_copy(update={"precision": "bf16"})
        with torch.device(device):
            objective = DitObjective(config, DitPaths(Path())).train()
        frequencies = objective.dit.rope.freqs.detach().clone()
        self.objective = objective.to(weights)
        objective.dit.rope.freqs.data = frequencies  # rounded, they would shift positions
        self.training = training if weights is torch.float32 else training.model_copy(update={"precision": "fp32"})
        if compiled:
            compile_blocks(objective)
        self.blocks = trained_blocks(objective)
        self._forwards = [block.forward for block in self.blocks]
        self.generator = torch.Generator(device=device)
        tokens = objective.dit.token_count((config.segment.latents, *config.latent_grid))
        wider = 1.3 if weights is torch.float32 else 1.0  # autocast's norms and sums are float32
        self.kept = wider * KEPT[compiled] * tokens * config.dit.hidden_size * len(self.blocks)

    def most(self) -> int:
        """Samples whose activations are reckoned to fit."""
        return max(1, int(free_bytes(self.device) / self.kept))

    def share(self) -> float:
        """Of the blocks, how many must be computed again for one sample to fit."""
        return min(1.0, max(0.1, math.ceil((1 - 0.9 * free_bytes(self.device) / self.kept) * 20) / 20))

    def run(self, flops: float, batch_size: int, recomputed: float, runs: int) -> dict[str, Any]:
        """Seconds, MFU and memory of steps of so many samples of `flops` each; `recomputed`: share of the blocks."""
        for block, forward in zip(self.blocks, self._forwards, strict=True):
            block.forward = forward  # type: ignore[method-assign]
        if recomputed:
            recompute_blocks(self.objective, recomputed)
        batch = random_batch(self.config, batch_size, self.device)

        def step() -> None:
            self.objective.zero_grad(set_to_none=True)
            self.generator.manual_seed(0)
            with autocast(self.training, torch.device(self.device)):
                losses = self.objective(batch, self.generator)
            losses.loss.backward()

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        synchronised(step, self.device)()
        first = time.perf_counter() - begin
        seconds = timed(synchronised(step, self.device), runs)
        speed = flops * batch_size / seconds["median"]
        found = {
            "batch_size": batch_size, "recomputed_share": recomputed, "compiled": self.compiled, "step_s": seconds,
            "first_step_s": first, "tflop": flops * batch_size / 1e12, "tflops_per_s": speed / 1e12,
            "mfu": speed / peak(self.device),
        }  # fmt: skip
        if self.device == "cuda":
            found["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["kernels"] = busiest_kernels(step)
        return found


def busiest_kernels(step: Callable[[], Any], count: int = 24) -> dict[str, Any]:
    """Milliseconds and calls of the kernels that take most of a step, and of all of them together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = sorted(profile.key_averages(), key=lambda its: -its.self_device_time_total)
    shown = {its.key[:90]: [round(its.self_device_time_total / 1e3, 2), its.count] for its in kernels[:count]}
    return {"all_ms": round(sum(its.self_device_time_total for its in kernels) / 1e3, 2), "ms_and_calls": shown}


def training_speed(
    size: tuple[int, int, int],
    small: bool,
    device: str,
    weights: torch.dtype,
    compiled: bool,
    runs: int,
    keep: Callable[[str, Any], None],
) -> None:
    """Steps at `size` (height, width, groups), with as few blocks recomputed as fits and with all; kept one by one."""
    with clean(device):
        flops, config = flops_of(*size, small), setting(*size, small)
        step = TrainingStep(config, device, weights, compiled)
        most, share = step.most(), step.share()
        plans = [("nothing recomputed", most, 0.0)] if step.kept < free_bytes(device) else []
        plans += [] if plans else [(f"{share:.0%} of the blocks recomputed", 1, share)]
        for name, count, recomputed in [*plans, ("all blocks recomputed", most, 1.0)]:
            try:
                keep(name, step.run(flops, count, recomputed, runs))
            except torch.cuda.OutOfMemoryError as error:
                keep(name, {"error": f"out of memory: {str(error)[:160]}", "batch_size": count})
                step.objective.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
