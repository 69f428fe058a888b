"""What the load test's clients take for wrong."""

from __future__ import annotations

import asyncio
import io

import httpx
import numpy as np
import pytest

from arlon_ray.generation.video import encode_fragment
from benchmarks.serve_load import Seen, follow

IN_PROGRESS, SEGMENT, COMPLETED = "in_progress", "segment.completed", "completed"
USUAL = [IN_PROGRESS, SEGMENT, SEGMENT, COMPLETED]


@pytest.mark.parametrize(
    ("events", "looks", "wrong"),
    [
        (USUAL, ["in_progress", "in_progress", "completed"], []),
        (USUAL, ["in_progress", "completed", "completed"], []),
        (USUAL, ["queued", "in_progress", "completed"], ["queued behind in_progress"]),
        ([SEGMENT, SEGMENT, COMPLETED], ["in_progress", "queued", "completed"], ["queued behind in_progress"]),
        (USUAL, ["completed", "in_progress", "completed"], ["in_progress behind completed"]),
        (USUAL, ["in_progress", "in_progress", "in_progress"], ["in_progress behind completed", "in_progress: None"]),
        (USUAL, ["in_progress", "in_progress", "failed"], ["failed behind completed", "failed: None"]),
    ],
)
def test_a_status_never_goes_back(events: list[str], looks: list[str], wrong: list[str]) -> None:
    left = list(looks)
    file = io.BytesIO(encode_fragment(np.zeros((8, 16, 16, 3), np.uint8), 8)).getvalue()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, text="".join(f"event: {event}\ndata: {{}}\n\n" for event in events))
        if request.url.path.endswith("/content"):
            return httpx.Response(200, content=file)
        return httpx.Response(200, json={"status": left.pop(0), "error": None, "segments": [{"frames": 8}]})

    async def watched() -> Seen:
        seen = Seen()
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://localhost") as http:
            await follow(http, {"id": "video_1", "status": "queued"}, 0.0, seen)
        return seen

    seen = asyncio.run(watched())
    assert (seen.wrong, left, len(seen.first_segment_s)) == (wrong, [], 1)
