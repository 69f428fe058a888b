"""A real server on a free port, in a thread: the service without Ray, whose stages draw pictures that can be seen."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvicorn
from starlette.types import ASGIApp

from arlon_ray.generation.video import encode_fragment
from serve.api import build_api
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.keys import KeyCheck, Keys
from serve.service import VideoService
from serve.work import Decoded, Frame, Job, Latents, Timed, Tokens, Told
from tests.serve.stages import FakeStages, small_config

PIXELS = 96
#: Wraps the application: for what a test needs between the browser and the API.
Around = Callable[[ASGIApp], ASGIApp]


class DrawnStages(FakeStages):
    """Takes its time. Rendering waits in the middle of segment `held_at`, for as long as there is one."""

    held_at: int | None = None
    step_s = 0.05  # of a segment, in each stage

    async def plan(self, *arguments: Any, **others: Any) -> Any:
        async for tokens in super().plan(*arguments, **others):
            await asyncio.sleep(self.step_s)
            yield tokens

    async def render(
        self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None, told: Told | None = None
    ) -> Timed[Latents]:
        steps = job.options.evaluations
        try:
            for step in range(1, steps + 1):
                if told:
                    await told(index, step)
                await asyncio.sleep(self.step_s / steps)
                while step == steps // 2 and self.held_at is not None and index >= self.held_at:
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.append(job.id)
            raise
        return await super().render(job, index, tokens, overlap)

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        return self._drawn(latents.shape[1] // 5 * 17, int(latents[0, 0, 0, 0]) // 100 + job.seed)

    async def preview(self, job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
        await asyncio.sleep(self.step_s)
        return self._drawn(len(tokens) * 17, int(tokens[-1, 0, 0]))

    def _drawn(self, count: int, number: int) -> Timed[Decoded]:
        """A disc that moves to the right; its colours are those of `number`."""
        y, x = np.mgrid[:PIXELS, :PIXELS] / PIXELS
        tone = np.array([np.sin(number * 1.7 + shift) for shift in (0, 2, 4)])
        ground = (190 + 30 * tone) * (1 - 0.3 * y[..., None])
        frames = np.empty((count, PIXELS, PIXELS, 3), np.uint8)
        for index in range(count):
            disc = (x - 0.2 - 0.6 * index / count) ** 2 + (y - 0.5) ** 2 < 0.02
            frames[index] = np.where(disc[..., None], 120 - 90 * tone, ground)
        return Timed(Decoded(encode_fragment(frames, self.config.video.fps), frames[-1]), time.time(), 0.0)


S = TypeVar("S", bound=FakeStages)


@contextmanager
def serving(
    folder: Path,
    *overrides: str,
    keys: Keys | None = None,
    around: Around = lambda app: app,
    port: int = 0,
    kind: type[S] = DrawnStages,  # type: ignore[assignment]
) -> Iterator[tuple[str, S]]:
    """Yields the server's address and its stages. What is unfinished at the end is given up."""
    config = small_config("serve.max_running=1", *overrides)
    stages = kind(config)
    service = VideoService(config, JobStore.in_folder(folder), stages, Blobs(folder))
    app = build_api(service, config, keys and KeyCheck(keys))
    with answering(around(app), port) as url:
        yield url, stages


@contextmanager
def answering(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """An application on a real HTTP server, in a thread; yields its address."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer takes 40 ms more
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
                time.sleep(0.02)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
