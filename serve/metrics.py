"""What Prometheus is told of the service, through Ray; `docs/grafana/serving.json` shows it.

Ray puts `ray_` before every name. Without a Ray that runs the figures are kept in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serve.logs import in_replica

PREFIX = "arlon_serve_"
Stage = Literal["ar", "dit", "decode"]
Tags = Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """One metric: histograms have the upper bounds of their buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0)
_SIZES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)

FIGURES: dict[str, Figure] = {
    "queue_length": Figure("gauge", "videos and drafts that wait"),
    "running": Figure("gauge", "videos and drafts that are being made"),
    "finished": Figure("counter", "videos and drafts by how they ended", ("status",)),
    "failures": Figure("counter", "videos and drafts that failed, by the error's code and the step", ("code", "step")),
    "first_segment_seconds": Figure(
        "histogram", "from the request to the first segment that can be seen", (), _SECONDS
    ),
    "segment_seconds": Figure("histogram", "work of one stage on one segment", ("stage",), _SECONDS),
    "ar_tokens": Figure("counter", "tokens that the AR has made"),
    "batch_size": Figure(
        "histogram", "segments, or plans, in one pass through the model: the mean of a segment", ("stage",), _SIZES
    ),
    "tenant_queue_length": Figure("gauge", "the same of each tenant that the configuration names", ("tenant",)),
    "tenant_running": Figure("gauge", "the same of each tenant that the configuration names", ("tenant",)),
    "tenant_finished": Figure("counter", "videos and drafts of a tenant by how they ended", ("tenant", "status")),
    "tenant_refused": Figure("counter", "requests that were refused for a quota or a full queue", ("tenant", "code")),
    "tenant_wait_seconds": Figure("histogram", "from the request to the turn", ("tenant",), _SECONDS),
    "bundle_changes": Figure("counter", "bundles that were to be served, by what became of it", ("result",)),
    "requests": Figure("counter", "HTTP requests", ("method", "route", "status")),
    "request_seconds": Figure("histogram", "HTTP requests, to the end of the answer", ("method", "route"), _SHORT),
}


class Recorder(Protocol):
    """Where figures go; `name` is one of FIGURES."""

    def count(self, name: str, value: float, tags: Tags) -> None:
        """Add to a counter."""

    def set(self, name: str, value: float, tags: Tags) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, tags: Tags) -> None:
        """Put a value into a histogram."""


class MemoryRecorder:
    """Keeps what it is told, for tests: sums of counters, the last of gauges, all values of histograms."""

    def __init__(self) -> None:
        self.counters: dict[tuple[str, ...], float] = defaultdict(float)
        self.gauges: dict[tuple[str, ...], float] = {}
        self.values: dict[tuple[str, ...], list[float]] = defaultdict(list)

    def count(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        self.counters[_key(name, tags)] += value

    def set(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        self.gauges[_key(name, tags)] = value

    def observe(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        self.values[_key(name, tags)].append(value)


class RayRecorder:
    """Ray's metrics; inside a replica they carry the deployment and the replica as tags. Needs a Ray that runs."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def count(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        if value > 0:  # Ray takes no zero
            self._metric(name).inc(value, tags=dict(tags))

    def set(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        self._metric(name).set(value, tags=dict(tags))

    def observe(self, name: str, value: float, tags: Tags) -> None:
        """See Recorder."""
        self._metric(name).observe(value, tags=dict(tags))

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.serve import metrics

            figure = FIGURES[name]
            kinds = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}
            bounds = {"boundaries": list(figure.bounds)} if figure.kind == "histogram" else {}
            made = kinds[figure.kind](PREFIX + name, description=figure.description, tag_keys=figure.tags, **bounds)
            self._made[name] = made
        return self._made[name]


class _Nowhere:
    """Forgets everything: outside Ray nobody would read it."""

    def count(self, name: str, value: float, tags: Tags) -> None: ...

    def set(self, name: str, value: float, tags: Tags) -> None: ...

    def observe(self, name: str, value: float, tags: Tags) -> None: ...


class Metrics:
    """What the service and the deployments have to say, in their own words. Never raises, never waits."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        """Without `recorder`: Ray's metrics inside a replica, nowhere else."""
        self._to: Recorder = recorder or (RayRecorder() if in_replica() else _Nowhere())

    def queue(self, queued: int, running: int) -> None:
        """How many videos and drafts wait, and are being made, now."""
        self._to.set("queue_length", queued, {})
        self._to.set("running", running, {})

    def first_segment(self, seconds: float) -> None:
        """A first segment can be seen, so long after its request."""
        self._to.observe("first_segment_seconds", seconds, {})

    def segment(self, stage: Stage, seconds: float) -> None:
        """A stage has worked on a segment."""
        self._to.observe("segment_seconds", seconds, {"stage": stage})

    def tokens(self, count: int) -> None:
        """The AR has made so many tokens."""
        self._to.count("ar_tokens", count, {})

    def batch(self, stage: Stage, size: float) -> None:
        """So many were in one pass through the model, in the mean over a segment's passes."""
        self._to.observe("batch_size", size, {"stage": stage})

    def finished(self, status: str) -> None:
        """A video or draft is completed, failed or deleted."""
        self._to.count("finished", 1, {"status": status})

    def failure(self, code: str, step: str = "") -> None:
        """Why a video or draft has failed: the code in its error, and what failed, if a step of a segment did."""
        self._to.count("failures", 1, {"code": code, "step": step})

    def tenant_queue(self, tenant: str, queued: int, running: int) -> None:
        """The same as `queue` of one tenant, or of all that the configuration does not name."""
        self._to.set("tenant_queue_length", queued, {"tenant": tenant})
        self._to.set("tenant_running", running, {"tenant": tenant})

    def tenant_finished(self, tenant: str, status: str) -> None:
        """The same as `finished`."""
        self._to.count("tenant_finished", 1, {"tenant": tenant, "status": status})

    def refused(self, tenant: str, code: str) -> None:
        """A request of a tenant was refused; `code` is the one in its error."""
        self._to.count("tenant_refused", 1, {"tenant": tenant, "code": code})

    def waited(self, tenant: str, seconds: float) -> None:
        """So long after its request a video of a tenant had its turn."""
        self._to.observe("tenant_wait_seconds", seconds, {"tenant": tenant})

    def exchanged(self, result: str) -> None:
        """Another bundle was to be served: "done" or "refused"."""
        self._to.count("bundle_changes", 1, {"result": result})

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request has been answered; `route` is the template, never a path that a client made up."""
        self._to.count("requests", 1, {"method": method, "route": route, "status": str(status)})
        self._to.observe("request_seconds", seconds, {"method": method, "route": route})


def _key(name: str, tags: Tags) -> tuple[str, ...]:
    return (name, *(tags[tag] for tag in FIGURES[name].tags))
