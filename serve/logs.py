"""Log lines that can be followed: every one carries the id of the request that it belongs to, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from ray import serve

#: Of the request that is being answered, or that asked for the video which is being made.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

#: `serve.log_format` and `serve.log_level`.
LogSettings = tuple[Literal["text", "json"], str]

#: Beyond the message, what a line may carry as fields of its own (`extra=`).
FIELDS = ("method", "route", "status", "seconds", "caller", "job", "stage", "segment")

_stages = logging.getLogger("serve.stages")


class RequestIdFilter(logging.Filter):
    """Gives every record its `request_id`; one that it has already stays. Filters nothing out."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        if (request_id := REQUEST_ID.get()) or not getattr(record, "request_id", ""):
            record.request_id = request_id or "-"
        return True


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, request_id, message, the fields that the line has, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "request_id": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


TEXT = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(request_id)s %(message)s")


def set_up_logging(style: Literal["text", "json"], level: str) -> None:
    """Give the loggers of `serve` a place to write to: stderr, or inside a Ray Serve replica Serve's own log file.

    There Serve decides on the form of the lines: app.py passes `style` on to its LoggingConfig.
    """
    logger = logging.getLogger("serve")
    logger.setLevel(level.upper())
    logger.propagate = False
    if in_replica():
        logger.handlers = list(logging.getLogger("ray.serve").handlers)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines() if style == "json" else TEXT)
        logger.handlers = [handler]
    for each in logger.handlers:
        if not any(isinstance(known, RequestIdFilter) for known in each.filters):
            each.addFilter(RequestIdFilter())


def in_replica() -> bool:
    """Whether this process is a replica of a Ray Serve deployment."""
    try:
        serve.get_replica_context()
    except Exception:  # Serve's own error, or that Ray does not run
        return False
    return True


@contextmanager
def on_behalf_of(request_id: str) -> Iterator[None]:
    """Log lines of the block belong to that request, which may have been answered long ago."""
    token = REQUEST_ID.set(request_id)
    try:
        yield
    finally:
        REQUEST_ID.reset(token)


def log_stage(request_id: str, job: str, stage: str, segment: int, seconds: float) -> None:
    """One line for a stage's work on one segment: who looks for the request id finds it in every deployment's log."""
    with on_behalf_of(request_id or REQUEST_ID.get()):
        _stages.info(
            "request_id %s %s segment %d stage %s %.3f s", REQUEST_ID.get() or "-", job, segment, stage, seconds,
            extra={"job": job, "stage": stage, "segment": segment, "seconds": round(seconds, 6)},
        )  # fmt: skip
