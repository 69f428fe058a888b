"""Stages of one process that draw plain pictures: the service without Ray and without models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from arlon_ray.config import Config, load_config
from arlon_ray.generation.video import encode_fragment
from serve.work import Decoded, Frame, Job, Latents, Permit, Timed, Tokens, Told, WorkerLost


def small_config(*overrides: str) -> Config:
    """16×16 pixels, segments of two groups, one of them overlap."""
    small = ["video.height=16", "video.width=16", "vqvae.coarse.patch=[1, 2, 2]"]
    return load_config("tiny", [*small, "segment.groups=2", "segment.overlap_groups=1", *overrides])


class FakeStages:
    """Records what is asked of it. `gate` (if closed) holds every rendering but of `free` jobs; `fail_at` makes one
    segment fail.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gate = asyncio.Event()
        self.gate.set()
        self.free: set[str] = set()
        self.fail_at: int | None = None
        self.planned: list[tuple[str, int]] = []
        self.rendered: list[tuple[str, int]] = []
        self.overlaps: list[Latents | None] = []
        self.tokens: list[Tokens | None] = []
        self.cancelled: list[str] = []
        self.givens: list[Latents | None] = []
        self.previewed: list[list[int]] = []
        self.losses: list[str] = []
        self.closed_plans = 0
        self.alive = self.most_alive = 0

    async def plan(
        self, job: Job, permit: Permit, planned: Sequence[Tokens] = (), given: Latents | None = None
    ) -> AsyncIterator[Timed[Tokens]]:
        """Tokens of segment k: k in its first group, k + 1 in its last; 100 times the seed more."""
        self.givens.append(given)
        try:
            for index in range(len(planned), len(job.prompts)):
                if await permit(index) <= index:
                    return
                self.lose("plan")
                self.planned.append((job.id, index))
                yield Timed(tokens_of(index, job.seed), time.time(), 0.0)
        finally:
            self.closed_plans += 1

    async def render(
        self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None, told: Told | None = None
    ) -> Timed[Latents]:
        self.lose("render")
        for step in range(job.options.evaluations):
            if told:
                await told(index, step + 1)
        self.alive += 1
        self.most_alive = max(self.alive, self.most_alive)
        try:
            if job.id not in self.free:
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
        segment = self.config.segment
        given = 0 if overlap is None else min(overlap.shape[1], segment.overlap_latents)
        latents = segment.latents - (segment.overlap_latents if index else given)
        steps = np.arange(latents, dtype=np.float32)[None, :, None, None] + 100 * index
        return Timed(np.broadcast_to(steps, (1, latents, 2, 2)).copy(), time.time(), 0.01)

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        self.lose("decode")
        # another picture for other latents, and for another frame before
        grey = int(latents[0, 0, 0, 0]) + (0 if before is None else 7 * int(before[0, 0, 0]) + 1)
        return self._frames(latents.shape[1] // 5 * 17, grey % 256)

    async def preview(self, job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
        self.previewed.append(tokens[:, 0, 0].tolist())
        return self._frames(len(tokens) * 17, int(tokens[-1, 0, 0]) % 256)

    async def encode(self, job: Job, picture: Frame) -> Timed[Latents]:
        return Timed(np.full((1, 1, 2, 2), picture.mean(), np.float32), time.time(), 0.01)

    def hang_at(self, index: int) -> asyncio.Event:
        """Never come to an end with segment `index`; set when one gets there."""
        plain, reached = self.render, asyncio.Event()

        async def render(job: Job, number: int, *others: Any) -> Timed[Latents]:
            if number == index:
                reached.set()
                await asyncio.Event().wait()
            return await plain(job, number, *others)

        self.render = render  # type: ignore[method-assign]
        return reached

    def lose(self, stage: str) -> None:
        """Fail as if the replica were gone, if this call is one of `losses`."""
        if stage in self.losses:
            self.losses.remove(stage)
            raise WorkerLost("gone")

    def _frames(self, count: int, grey: int) -> Timed[Decoded]:
        frames = np.full((count, 16, 16, 3), grey, np.uint8)
        return Timed(Decoded(encode_fragment(frames, self.config.video.fps), frames[-1]), time.time(), 0.0)


def tokens_of(index: int, seed: int = 0) -> Tokens:
    """What the stages plan as segment `index`."""
    return np.array([index, index + 1], np.int32)[:, None, None] + 100 * (seed % 100)
