"""Progress of a training on the terminal: a bar where there is one, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

#: Figures that the line shows in its own way, or that only the tracking needs.
NOT_REPEATED = {"step_s", "samples_per_s", "tokens_per_s", "data_wait", "learning_rate", "grad_norm", "tflops_per_s"}
#: Likewise, and what begins with one of these: there are many.
NOT_SHOWN = ("time/", "gates/", "system/")


def _hidden(name: str) -> bool:
    return name in NOT_REPEATED or name.startswith(NOT_SHOWN)


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:03 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class QuietReporter:
    """A Reporter that does nothing with what it is told: for those that listen to a part of it."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """See Reporter."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """See Reporter."""

    def line(self, text: str) -> None:
        """See Reporter."""


class ConsoleReporter:
    """Prints the steps done, the figures, the rate and the time left."""

    def __init__(self, name: str, total_steps: int, *, bar: bool | None = None) -> None:
        self.name, self.total_steps = name, total_steps
        self._bar: Any = None
        self._last_line = 0.0
        if sys.stderr.isatty() if bar is None else bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, desc=name, unit="step", dynamic_ncols=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line for the steps' figures, or for those of the evaluation."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if not _hidden(name))
        if "step_s" not in values:
            if shown:
                self.line(f"{self.name}: {shown}")
            return
        rate = f"{values['samples_per_s']:.1f} samples/s"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"{shown}  {rate}")
            if step == self.total_steps:
                self._bar.close()
                self._bar = None
            return
        left = duration((self.total_steps - step) * values["step_s"])
        # A line a second is enough for anyone; the first and the last are always there.
        if step in (1, self.total_steps) or time.monotonic() - self._last_line >= 1.0:
            self._last_line = time.monotonic()
            self.line(f"{self.name} {step:>6}/{self.total_steps}  {shown}  {rate}  {left} left")

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """A terminal shows no pictures."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """Checkpoints are not worth a line each."""

    def line(self, text: str) -> None:
        """Print above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
