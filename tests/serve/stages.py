"""Stages of one process that draw plain pictures: the service without Ray and without models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np

from arlon_ray.config import Config, load_config
from arlon_ray.generation.video import encode_fragment
from serve.work import Decoded, Frame, Job, Latents, Permit, Timed, Tokens


def small_config(*overrides: str) -> Config:
    """16×16 pixels, segments of two groups, one of them overlap."""
    small = ["video.height=16", "video.width=16", "vqvae.coarse.patch=[1, 2, 2]"]
    return load_config("tiny", [*small, "segment.groups=2", "segment.overlap_groups=1", *overrides])


class FakeStages:
    """Records what is asked of it. `gate` (if closed) holds every rendering; `fail_at` makes one segment fail."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_at: int | None = None
        self.planned: list[tuple[str, int]] = []
        self.rendered: list[tuple[str, int]] = []
        self.overlaps: list[Latents | None] = []
        self.tokens: list[Tokens | None] = []
        self.befores: list[int | None] = []
        self.cancelled: list[str] = []
        self.closed_plans = 0
        self.alive = self.most_alive = 0

    async def plan(self, job: Job, permit: Permit) -> AsyncIterator[Timed[Tokens]]:
        try:
            for index in range(len(job.prompts)):
                if not await permit(index):
                    return
                self.planned.append((job.id, index))
                yield Timed(np.full((2, 1, 1), index, np.int32), time.time(), 0.0)
        finally:
            self.closed_plans += 1

    async def render(self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None) -> Timed[Latents]:
        self.alive += 1
        self.most_alive = max(self.alive, self.most_alive)
        try:
            await self.gate.wait()
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.append(job.id)
            raise
        finally:
            self.alive -= 1
        if index == self.fail_at:
            raise MemoryError("/secret/path: no memory")
        self.rendered.append((job.id, index))
        self.overlaps.append(overlap)
        self.tokens.append(tokens)
        latents = 5 * (self.config.segment.groups - (self.config.segment.overlap_groups if index else 0))
        steps = np.arange(latents, dtype=np.float32)[None, :, None, None] + 100 * index
        return Timed(np.broadcast_to(steps, (1, latents, 2, 2)).copy(), time.time(), 0.01)

    async def decode(self, job: Job, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        self.befores.append(None if before is None else int(before[0, 0, 0]))
        frames = np.full((latents.shape[1] // 5 * 17, 16, 16, 3), len(self.befores), np.uint8)
        return Timed(Decoded(encode_fragment(frames, self.config.video.fps), frames[-1]), time.time(), 0.0)
