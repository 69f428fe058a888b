"""When the stages worked on a video, for people to look at."""

from __future__ import annotations

from typing import Any

from arlon_ray.generation.overlapped import trace_events
from serve.schema import Video

_STAGES = ("ar", "dit", "decode")


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
