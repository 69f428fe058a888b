"""The memory that `--dry-run` plans beside what a process really takes.

`python -m benchmarks.memory --output benchmarks/results/memory_cpu.json` measures every case in a process of its own:
resident memory at its peak over two steps of the stage's model, less that of the process after one step with one
sample, when all libraries have made themselves at home. glibc gives small freed pieces back only if it is told to
(`MALLOC_MMAP_THRESHOLD_`), which the processes are; without, a worker on a CPU takes up to twice as much.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from arlon_ray.config import load_config
from arlon_ray.training.engine import recompute_blocks
from arlon_ray.training.memory import Probe, plan_memory, probe_of, training_of
from arlon_ray.training.optimizer import build_optimizers, parameter_groups
from benchmarks.machine import machine
from jobs.command_line import parser, run

#: (preset, stage, samples at once, blocks computed again)
CASES = [
    ("tiny", "dit", 24, False), ("tiny", "dit", 24, True), ("tiny", "ar", 32, False), ("tiny", "vqvae_fine", 32, False),
    ("tiny", "vae", 8, False), ("small", "dit", 1, False), ("small", "dit", 1, True), ("small", "ar", 2, False),
]  # fmt: skip
LOOK_S = 0.002


def compare(preset: str, stage: str, batch: int, again: bool) -> dict[str, Any]:
    """Planned and measured bytes of one case, each measured in a new process."""
    words = [sys.executable, "-m", "benchmarks.memory", "--case", preset, stage, str(batch), str(int(again))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        words, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    return json.loads(ended.stdout.splitlines()[-1])


def _case(preset: str, stage: str, batch: int, again: bool) -> dict[str, Any]:
    """In that process."""
    section = f"vqvae.{stage.removeprefix('vqvae_')}" if stage.startswith("vqvae") else stage
    settings = {
        "batch_size": batch,
        "zero_stage": 0,
        "activation_checkpointing": str(again).lower(),
        "precision": "fp32",
    }
    config = load_config(preset, [f"{section}.training.{name}={value}" for name, value in settings.items()])
    plan = plan_memory(config, stage, 1)
    _two_steps(probe_of(config, stage, 1), again=False, averaged=False, steps=1)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, peak, ended = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while not ended.wait(LOOK_S):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=look)
    watcher.start()
    begin = time.perf_counter()
    _two_steps(probe_of(config, stage, batch), again, averaged=bool(training_of(config, stage).ema_decay))
    ended.set()
    watcher.join()
    measured = peak[0] - before
    return {
        "preset": preset, "stage": stage, "samples": batch, "computed_again": again,
        "planned": plan.total, "measured": measured, "ratio": plan.total / measured,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def _two_steps(probe: Probe, again: bool, averaged: bool, steps: int = 2) -> None:
    """Steps of the stage's own optimizers, and what the averaged weights take."""
    model = probe.model
    if again:
        recompute_blocks(model)
    optimizers = build_optimizers(parameter_groups(model, probe.training))
    average = [p.detach().clone() for p in model.parameters() if p.requires_grad] if averaged else []
    for _ in range(steps):
        probe.loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    del average


def main() -> None:
    """Command line."""
    if "--case" in sys.argv:
        preset, stage, batch, again = sys.argv[sys.argv.index("--case") + 1 :][:4]
        print(json.dumps(_case(preset, stage, int(batch), again == "1")))
        return
    flags = parser(__doc__ or "", output="memory.json", config=False)
    arguments = flags.parse_args()
    rows = []
    for case in CASES:
        rows.append(compare(*case))
        row = rows[-1]
        print(
            f"{case}: planned {row['planned'] >> 20} MiB, measured {row['measured'] >> 20}: {row['ratio']:.2f}",
            flush=True,
        )
    result = {"machine": machine(), "torch": torch.__version__, "cases": rows}
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
