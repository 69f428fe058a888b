"""Scenarios: a client against the API over stages of one process."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from serve.api import build_api
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.service import VideoService
from tests.serve.stages import FakeStages, small_config

Scenario = Callable[[httpx.AsyncClient, FakeStages], Coroutine[Any, Any, None]]


def driven(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """The test in an event loop of its own."""

    @functools.wraps(test)
    def run(**fixtures: object) -> None:
        asyncio.run(test(**fixtures))

    return run


def play(
    scenario: Scenario,
    folder: Path,
    *overrides: str,
    count_tokens: Callable[[str], int] | None = None,
    bundle: str = "",
) -> None:
    """Run a scenario against the API of a fresh service with its files in `folder`."""

    async def over_http(service: VideoService, stages: FakeStages) -> None:
        transport = httpx.ASGITransport(build_api(service, stages.config), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await scenario(client, stages)

    serve_alone(over_http, folder, *overrides, count_tokens=count_tokens, bundle=bundle)


def serve_alone(
    scenario: Callable[[VideoService, FakeStages], Coroutine[Any, Any, None]],
    folder: Path,
    *overrides: str,
    count_tokens: Callable[[str], int] | None = None,
    bundle: str = "",
) -> None:
    """The same without HTTP."""

    async def run() -> None:
        config = small_config("serve.max_running=1", *overrides)
        stages = FakeStages(config)
        store, blobs = JobStore.in_folder(folder), Blobs(folder)
        service = VideoService(config, store, stages, blobs, count_tokens, bundle=bundle)
        await service.start()
        try:
            async with asyncio.timeout(30):
                await scenario(service, stages)
        finally:
            await service.close()

    asyncio.run(run())


async def post(client: httpx.AsyncClient, **body: Any) -> dict:
    """Ask for a video that is accepted."""
    response = await client.post("/v1/videos", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def until(client: httpx.AsyncClient, video_id: str, *statuses: str) -> dict:
    """The video or draft, as soon as it has one of `statuses`."""
    kind = "drafts" if video_id.startswith("draft_") else "videos"
    while True:
        video = (await client.get(f"/v1/{kind}/{video_id}")).json()
        if video["status"] in statuses:
            return video
        await asyncio.sleep(0.01)
