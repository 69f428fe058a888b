"""A reporter that keeps what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np


class Recorder:
    """Implements Reporter. `interrupt_at` raises KeyboardInterrupt once that checkpoint was written."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.pictures: dict[str, np.ndarray] = {}
        self.checkpoints: list[int] = []
        self.lines: list[str] = []
        self.interrupt_at = interrupt_at

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.values.setdefault(step, {}).update(values)

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        self.pictures[name] = array

    def checkpoint(self, step: int, folder: Path) -> None:
        self.checkpoints.append(step)
        if step == self.interrupt_at:
            raise KeyboardInterrupt

    def line(self, text: str) -> None:
        self.lines.append(text)

    def losses(self) -> dict[int, tuple[float, float, float]]:
        """Per logged step: loss, error and gradient norm."""
        return {s: (v["loss"], v["error"], v["grad_norm"]) for s, v in self.values.items() if "loss" in v}
