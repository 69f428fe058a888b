"""Spans to a collector, in OpenTelemetry's own protocol over HTTP: `serve.trace_exporter=serve.otlp:processors`."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def processors() -> list[SpanProcessor]:
    """What Ray Serve asks each process for. Where spans go, OpenTelemetry's own variables say.

    OTEL_EXPORTER_OTLP_ENDPOINT (by default port 4318 of this host), OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, …:
    in the environment of `ray start`.
    """
    return [_WithoutNews(OTLPSpanExporter())]


class _WithoutNews(BatchSpanProcessor):
    """Without what tells the API of denoising steps: of many requests, several times a second."""

    def on_end(self, span: ReadableSpan) -> None:
        """See SpanProcessor."""
        if not span.name.endswith(" told"):
            super().on_end(span)
