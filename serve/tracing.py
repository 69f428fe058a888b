"""What became of one request: when the stages worked on a video, and spans of it for OpenTelemetry.

Who collects traces sets `serve.trace_exporter` (docs/serving.md): Ray Serve sends its spans there, of HTTP requests and
of calls between deployments, and those from here lie among them. Without it the functions here do next to nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from arlon_ray.generation.overlapped import trace_events
from serve.schema import Video

_STAGES = ("ar", "dit", "decode")
_FORMAT = TraceContextTextMapPropagator()


def trace_of(video: Video, request_id: str = "") -> dict[str, Any]:
    """Trace events of a video's timings, which Perfetto (ui.perfetto.dev) shows: a row a stage, a bar a segment.

    What has not run yet is left out.
    """
    spans = []
    for times in video.timings:
        for stage in _STAGES:
            start, seconds = getattr(times, f"{stage}_start_s"), getattr(times, f"{stage}_s")
            if start is not None and seconds is not None:
                spans.append((stage, times.index, start, start + seconds))
    about = {"id": video.id, "model": video.model, "status": video.status, "request_id": request_id}
    name = {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": video.id}}
    return {"traceEvents": [name, *trace_events(spans)], "displayTimeUnit": "ms", "otherData": about}


def traceparent() -> str:
    """Where this code runs within a trace, as W3C's trace context says it; empty where nothing is traced."""
    carrier: dict[str, str] = {}
    _FORMAT.inject(carrier)
    return carrier.get("traceparent", "")


@contextmanager
def span(name: str, parent: str = "", **about: str | int) -> Iterator[None]:
    """The block is a span, in the trace of `parent` (see `traceparent`) or of the span around it.

    An exception that leaves the block is noted there, and that it was cancelled. `about` are its attributes, as
    `arlon.…`.
    """
    context = _FORMAT.extract({"traceparent": parent}) if parent else None
    with _tracer().start_as_current_span(f"arlon.{name}", context, attributes=_attributes(about)) as current:
        try:
            yield
        except asyncio.CancelledError:
            current.set_attribute("arlon.cancelled", True)
            raise


def worked(stage: str, job: str, segment: int, started: float, seconds: float) -> None:
    """A span of a stage's work on a segment, which began at `started` (Unix seconds) and is over.

    None where the call that it was for is not traced: it would be a trace of its own.
    """
    if not trace.get_current_span().get_span_context().is_valid:
        return
    about = _attributes({"job": job, "segment": segment})
    done = _tracer().start_span(f"arlon.{stage}", attributes=about, start_time=round(started * 1e9))
    done.end(round((started + seconds) * 1e9))


def _tracer() -> trace.Tracer:
    return trace.get_tracer("arlon")


def _attributes(about: dict[str, str | int]) -> dict[str, str | int]:
    return {f"arlon.{name}": value for name, value in about.items()}
