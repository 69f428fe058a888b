"""What a figure was measured on."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

#: Instructions that products of matrices use.
FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "amx_tile"}


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and versions: of the libraries, and of this code where it lies in a repository."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = {flag for line in _lines("/proc/cpuinfo") if line.startswith("flags") for flag in line.split()}
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cpu_flags": sorted(flags & FLAGS),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


def _commit() -> str | None:
    """Of this code; None where it is no checkout, "-dirty" behind it where files have changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None


def device_or_exit(device: str, instead: str = "--device cpu") -> str:
    """`device`, which a benchmark was asked for. Says so and exits with 2 if it is a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        print(f"error: --device cuda: torch finds no GPU here; use {instead}", file=sys.stderr)
        raise SystemExit(2)
    return device


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def timed(work: Callable[[], Any], runs: int = 5) -> dict[str, float]:
    """Seconds of `work` after one run to warm up: median, minimum, maximum."""
    work()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def in_turns(works: Mapping[str, Callable[[], Any]], runs: int = 5) -> dict[str, dict[str, Any]]:
    """`timed` of several works that take turns, so that what disturbs the machine meets all of them alike.

    Every work runs once to warm up. On a GPU each must end with its device (`synchronised`). The first is what the
    others are compared with, their `base`: `times_as_fast` is the median over the rounds of its seconds over theirs,
    `from` and `to` the smallest and the largest.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    base = next(iter(works))
    for _ in range(runs):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    found: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        ratios = [of_base / value for of_base, value in zip(seconds[base], values, strict=True)]
        found[name] = {
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "times_as_fast": statistics.median(ratios), "from": min(ratios), "to": max(ratios), "base": base,
        }  # fmt: skip
    return found


def synchronised(work: Callable[[], Any], device: str) -> Callable[[], None]:
    """`work` that ends when the device has ended."""

    def run() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def tell(result: Mapping[str, Any], file: str | Path | None) -> None:
    """Print what was found as JSON, and write it to a file if there is to be one."""
    text = json.dumps(result, indent=2)
    print(text)
    if file:
        Path(file).write_text(text + "\n")


def peak_memory_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
