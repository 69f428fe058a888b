"""How the C library gives memory to threads."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: The same for a process that is started with it, by the name of its environment variable.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
_M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Let threads that start from now on allocate from the process's own heap (glibc; elsewhere nothing happens).

    glibc gives each thread a heap of its own, which hands large pieces back to the system as soon as they are free: a
    model that runs in a thread faults its activations in anew at every step, and takes a quarter longer on a CPU
    (docs/training.md).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
