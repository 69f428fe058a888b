"""Figures of a training as Ray metrics, which Prometheus finds where it finds Ray's own; `docs/grafana` shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arlon_ray.training.reporting import QuietReporter

PREFIX = "arlon_train_"


def metric_name(figure: str) -> str:
    """`time/forward_s` → `arlon_train_time_forward_s`; Prometheus puts `ray_` before it."""
    return PREFIX + re.sub(r"\W+", "_", figure)


class RayMetrics(QuietReporter):
    """A Reporter: one gauge a figure, with the stage as tag. Needs a Ray that runs."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._gauges: dict[str, Any] = {}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        from ray.util.metrics import Gauge

        for figure, value in {"step": float(step), **values}.items():
            name = metric_name(figure)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=f"{figure} of a training stage", tag_keys=("stage",))
            self._gauges[name].set(value, tags={"stage": self.stage})
