"""`--dry-run` of the jobs that train: what a worker will need, before anything starts."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from arlon_ray.config import Config
from arlon_ray.training.memory import MemoryPlan, plan_memory, training_of
from jobs.ray_training import check_workers

GIB = 2**30
WORDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer's state",
    "average": "averaged weights",
    "activations": "activations at the peak",
    "communication": "DeepSpeed's buckets",
    "offloaded": "optimizer's state, in main memory",
}


def planning() -> bool:
    """Whether the command line asks for a plan only: then it needs no inputs."""
    return "--dry-run" in sys.argv[1:]


def add_dry_run(flags: argparse.ArgumentParser) -> None:
    """The flags of a plan."""
    flags.add_argument("--dry-run", action="store_true", help="print the memory that each worker needs, and end")
    flags.add_argument(
        "--memory-gib", type=float, metavar="N", help="with --dry-run: a worker's memory (default: this machine's)"
    )


def print_plan(config: Config, stage: str, memory_gib: float | None = None) -> MemoryPlan:
    """Print the plan of `stage` and whether it fits. Raises InputError if the batch cannot be split."""
    training, workers = training_of(config, stage), config.cluster.num_workers
    check_workers(stage, training, config)
    plan = plan_memory(config, stage, workers)
    samples = training.batch_size * training.sequence_parallel // workers // training.accumulation
    print(f"{stage}: {workers} workers, ZeRO {training.zero_stage}, {samples} samples at once in each")
    for name, words in WORDS.items():
        if size := getattr(plan, name):
            print(f"  {words:<34}{_size(size):>12}")
    room, of_what = _room(config, memory_gib)
    fits = "fits" if plan.total <= room else "does not fit"
    print(f"  {'a worker, beside its process':<34}{_size(plan.total):>12}  {fits} into {_size(int(room))} ({of_what})")
    return plan


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _room(config: Config, memory_gib: float | None) -> tuple[float, str]:
    """Bytes for one worker, and where that number is from."""
    if memory_gib is not None:
        return memory_gib * GIB, "--memory-gib"
    if config.cluster.use_gpu and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), torch.cuda.get_device_name()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory / config.cluster.num_workers, "this machine's memory, shared by all workers"
