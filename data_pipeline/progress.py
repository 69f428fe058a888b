"""Progress of a job: a bar with rate and time left on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

#: Seconds between two plain lines.
LINE_EVERY_S = 10.0


class Progress:
    """Counts `unit`s up to `total`. Use as a context manager."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._started = self._printed = time.monotonic()
        self._bar = tqdm(total=total, desc=label, unit=f" {unit}") if sys.stderr.isatty() else None

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed > LINE_EVERY_S:
            self._line()

    def reach(self, done: int) -> None:
        """`done` are done in all."""
        if done > self.done:
            self.advance(done - self.done)

    def _line(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        rate = self.done / max(seconds, 1e-6)
        print(f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f}/s", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()
