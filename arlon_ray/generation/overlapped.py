"""Stages of one video at work at the same time, each in a thread of its own, and a record of who worked when."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def in_background(items: Iterator[T], ahead: int) -> Iterator[T]:
    """The same items, made in a thread that is at most `ahead` of them in front of whoever takes them.

    What the thread raises is raised here, in its turn. When this ends or is closed the thread stops before its next
    item, and `items` is closed.
    """
    ready: queue.Queue[Any] = queue.Queue()
    room, ended = threading.Semaphore(ahead), threading.Event()

    def make() -> None:
        try:
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
