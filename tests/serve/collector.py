"""A collector of OpenTelemetry's spans: its protocol over HTTP, on a free port."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """What was told of one."""

    name: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    error: bool
    about: dict[str, str | int]


@dataclass
class Collector:
    """Listens at `url`, and keeps what it is told."""

    url: str
    spans: dict[str, Span] = field(default_factory=dict)

    def of(self, trace: str, name: str, count: int) -> list[Span]:
        """Spans of a trace whose names begin so, when at least `count` of them have come."""

        def found() -> list[Span]:
            return [span for span in list(self.spans.values()) if span.trace == trace and span.name.startswith(name)]

        _until(lambda: len(found()) >= count)
        return sorted(found(), key=lambda span: span.start)

    def above(self, span: Span, name: str) -> list[str]:
        """Names of the spans that it lies in, from the nearest on, when that of this name has come."""

        def names() -> list[str]:
            found, each = [], span
            while (above := self.spans.get(each.parent)) is not None:
                found.append(above.name)
                each = above
            return found

        _until(lambda: name in names())
        return names()

    def tops(self, trace: str, caller: str) -> set[str]:
        """Parents of a trace's spans that are not here, when all that has come lies below `caller`."""

        def found() -> set[str]:
            its = [span for span in list(self.spans.values()) if span.trace == trace]
            return {span.parent for span in its} - set(self.spans)

        _until(lambda: found() == {caller})
        return found()


def _until(done: Callable[[], bool], limit_s: float = 20) -> None:
    """Wait, for spans come late; whoever asks looks again at what there is then."""
    deadline = time.monotonic() + limit_s
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)


@contextmanager
def collecting() -> Iterator[Collector]:
    """Collect until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    for each in scope.spans:
                        span = _span(each)
                        collector.spans[span.id] = span
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _span(each: Any) -> Span:
    about = {pair.key: pair.value.string_value or pair.value.int_value for pair in each.attributes}
    return Span(
        each.name, each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex(),
        each.start_time_unix_nano, each.end_time_unix_nano, each.status.code == each.status.STATUS_CODE_ERROR, about,
    )  # fmt: skip
