"""What a figure was measured on."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and versions."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }


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


def in_turns(works: Mapping[str, Callable[[], Any]], runs: int = 5) -> dict[str, dict[str, float]]:
    """`timed` of several works that take turns, so that what disturbs the machine meets all of them alike.

    Every work runs once to warm up. On a GPU each must end with its device (`synchronised`). The first is what the
    others are compared with: `times_as_fast` is the median over the rounds of its seconds over theirs, `from` and `to`
    the smallest and the largest.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - begin)
    first = next(iter(seconds.values()))
    found = {}
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(first, values, strict=True)]
        found[name] = {
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "times_as_fast": statistics.median(ratios), "from": min(ratios), "to": max(ratios),
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
