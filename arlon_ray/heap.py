"""How the C library gives memory to threads, and takes it back."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

#: glibc's settings by the names of environment variables, with their numbers for `mallopt`.
_SETTINGS = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
}


def keep_freed_memory() -> None:
    """Let all threads that start from now on allocate from one heap, which keeps what is freed.

    glibc gives each thread a heap of its own, and hands large pieces back to the system as soon as they are free: a
    model on a CPU faults its activations in anew at every step, and DeepSpeed the whole of the gradients, which takes a
    quarter longer and more (docs/training.md). So no piece, however large, is mapped by itself. Elsewhere, and where
    the environment has settings of its own (MALLOC_…), nothing happens.
    """
    for number, value in _chosen().values():
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(number, value)


def heap_environment() -> dict[str, str]:
    """The same for processes that are started with it."""
    return {name: str(value) for name, (_, value) in _chosen().items()}


def _chosen() -> dict[str, tuple[int, int]]:
    return {} if any(name.startswith("MALLOC_") for name in os.environ) else _SETTINGS
