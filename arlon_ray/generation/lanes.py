"""The rows of one step side by side on the processor: each lane's rows are computed by a thread of its own.

Threads within every operation wait for one another hundreds of times a step: for a small model two of them are hardly
faster than one. Lanes meet once a step. What one thread computes of a row does not depend on the rows beside it, so it
is the same in any lane, to the last bit. That is not so of operations with many threads: there are no lanes of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from arlon_ray.generation.overlapped import computing_with

T = TypeVar("T")

#: One for each branch of guidance, with a thread each.
LANES = 2
_here = threading.local()


@contextmanager
def in_lanes(device: torch.device) -> Iterator[None]:
    """The block's `side_by_side` has lanes, if this thread computes on the processor with as many threads as those.

    All of the block then computes with one.
    """
    if device.type != "cpu" or torch.get_num_threads() != LANES:
        yield
        return
    with computing_with(1):
        _here.lanes = LANES
        try:
            yield
        finally:
            _here.lanes = 1


def lanes(rows: int) -> list[slice]:
    """The rows of each lane, here and now."""
    if rows < 2 or getattr(_here, "lanes", 1) == 1:
        return [slice(0, rows)]
    middle = (rows + 1) // 2
    return [slice(0, middle), slice(middle, rows)]


def side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return, each made in a lane, without gradients. Raises what the first that fails raises."""
    if len(calls) == 1:
        return [calls[0]()]

    def made(call: Callable[[], T]) -> T:
        with computing_with(1), torch.no_grad():
            return call()

    first, *others = calls
    pending = [_pool().submit(made, call) for call in others]
    try:
        result = first()
    finally:
        wait(pending)
    return [result, *(each.result() for each in pending)]


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="arlon-lane")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
