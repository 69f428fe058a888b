"""Stages of one video at work at the same time, each in a thread of its own, and a record of who worked when."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
_END = object()


class Threads(NamedTuple):
    """Threads of the processor for each stage that computes on it; None: the stages compute elsewhere."""

    ar: int | None = None
    dit: int | None = None
    decoder: int | None = None

    @classmethod
    def shared(cls, device: torch.device) -> Threads:
        """Torch's own number among stages at work at the same time: half of it for the DiT.

        With all threads for each, they wait for one another at every barrier: on two cores a third longer than one
        after the other.
        """
        if device.type != "cpu":
            return cls()
        total = torch.get_num_threads()
        return cls(max(1, total // 4), max(1, total // 2), max(1, total // 4))


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """The block computes with so many threads: a setting of the thread that it runs in."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def in_background(items: Iterator[T], ahead: int, threads: int | None = None) -> Iterator[T]:
    """The same items, made in a thread that is at most `ahead` of them in front of whoever takes them.

    `threads`: how many torch computes them with, if not as here. What the thread raises is raised here, in its turn.
    When this ends or is closed the thread stops before its next item, and `items` is closed.
    """
    ready: queue.Queue[Any] = queue.Queue()
    room, ended = threading.Semaphore(ahead), threading.Event()

    def make() -> None:
        try:
            with computing_with(threads):
                while room.acquire() and not ended.is_set():
                    ready.put((next(items, _END), None))
        except BaseException as error:
            ready.put((_END, error))
        finally:
            if (close := getattr(items, "close", None)) is not None:
                close()

    thread = threading.Thread(target=make, name="arlon-stage", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is _END:
                return
            room.release()
            yield item
    finally:
        ended.set()
        room.release()
        thread.join()


@dataclass
class Timeline:
    """When each stage worked on each segment: seconds since the first, by the clock of this process."""

    begin: float = field(default_factory=time.perf_counter)
    spans: list[tuple[str, int, float, float]] = field(default_factory=list)

    def timed(self, stage: str, segment: int, work: Callable[[], T]) -> T:
        """Do the work and note when it began and ended."""
        start = time.perf_counter()
        result = work()
        self.spans.append((stage, segment, start - self.begin, time.perf_counter() - self.begin))
        return result

    def seconds(self, stage: str) -> list[float]:
        """What the stage took for each segment, in order."""
        return [end - start for name, _, start, end in sorted(self.spans, key=lambda span: span[1]) if name == stage]

    def write(self, path: Path) -> None:
        """As trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show: a row a stage."""
        path.write_text(json.dumps({"traceEvents": trace_events(self.spans), "displayTimeUnit": "ms"}) + "\n")


def trace_events(spans: list[tuple[str, int, float, float]]) -> list[dict[str, Any]]:
    """Chrome's trace events of (stage, segment, start, end) in seconds."""
    stages = list(dict.fromkeys(stage for stage, *_ in sorted(spans, key=lambda span: span[2])))
    names = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": stage}}
        for number, stage in enumerate(stages)
    ]
    work = [
        {
            "ph": "X", "name": f"segment {segment}", "cat": stage, "pid": 1, "tid": stages.index(stage),
            "ts": start * 1e6, "dur": (end - start) * 1e6,
        }
        for stage, segment, start, end in spans
    ]  # fmt: skip
    return [*names, *work]
