"""What one video's work is made of, whoever does it: Ray Serve deployments, or a test in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from arlon_ray.generation import GenerationOptions, SegmentText

T = TypeVar("T")
Tokens = NDArray[np.int32]  # [t', h', w'] of one segment
Latents = NDArray[np.float32]  # [C, n, h, w]
Frame = NDArray[np.uint8]  # [H, W, 3]

#: Asked before a segment is planned: waits until that may be, and says how many of the video's segments may be planned
#: by now (a call between replicas is worth several). No more than `index`: nobody waits for the plan any more.
Permit = Callable[[int], Awaitable[int]]
#: Told (segment, denoising step, from 1) that a step has begun; not of all, where they are quick.
Told = Callable[[int, int], Awaitable[None]]


class WorkerLost(RuntimeError):
    """The process that worked on a call is gone, or could not be reached: the call may be made again."""


@dataclass(frozen=True)
class Job:
    """One video or draft: the text of each segment, and how it is made. What is kept of it in the database."""

    id: str
    prompts: tuple[SegmentText, ...]
    seed: int
    options: GenerationOptions
    #: The seed that each segment is planned with, where one has been rolled again; empty: `seed`.
    plan_seeds: tuple[int, ...] = ()
    #: Segments whose plan is made again, whatever is there of it.
    anew: tuple[int, ...] = ()
    #: The fingerprint of the bundle that makes it: what another one has begun, this one cannot go on with.
    bundle: str = ""
    #: Its folder.
    bundle_path: str = ""
    #: Of the HTTP request that asked for it: it finds the job's lines in every deployment's log.
    request_id: str = ""
    #: Where it stands in that request's trace (W3C trace context); empty: it is not traced.
    traceparent: str = ""
    #: In whose place its files lie (`Places`); empty: in the one that is nobody's own.
    tenant: str = ""

    @property
    def draft(self) -> bool:
        """A plan and its preview, nothing rendered."""
        return self.id.startswith(DRAFT)

    def plan_seed(self, index: int) -> int:
        """The seed that segment `index` is planned with."""
        return self.plan_seeds[index] if index < len(self.plan_seeds) else self.seed

    def planned_with(self, index: int) -> Job:
        """The job as the AR is to plan segment `index` of it."""
        return replace(self, seed=self.plan_seed(index))


VIDEO, DRAFT = "video_", "draft_"  # how ids begin
TRIAL = f"{VIDEO}trial"  # of what is made to try a bundle
JOB = TypeAdapter(Job)


@dataclass(frozen=True)
class Decoded:
    """Frames as an mp4 fragment, and the last of them."""

    fragment: bytes
    last: Frame


@dataclass(frozen=True)
class Timed(Generic[T]):
    """A result, when the work on it began (Unix seconds), and how long it took."""

    value: T
    started: float
    seconds: float


class Stages(Protocol):
    """The steps of making a video. All raise WorkerLost where a call may be made again."""

    def plan(
        self, job: Job, permit: Permit, planned: Sequence[Tokens] = (), given: Latents | None = None
    ) -> AsyncIterator[Timed[Tokens]]:
        """The tokens of one segment after the other, behind those that are planned; `given`: what it starts from."""

    async def render(
        self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None, told: Told | None = None
    ) -> Timed[Latents]:
        """The new latents of segment `index`; `overlap` are the latents before it, None for the first segment."""

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        """An mp4 fragment; `before` is the last frame of the segment before, None for the first."""

    async def preview(self, job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
        """The same of whole groups' tokens alone, without the DiT."""

    async def encode(self, job: Job, picture: Frame) -> Timed[Latents]:
        """The latents [C, 1, h, w] of a picture of the model's size."""


class PlanWindow:
    """Keeps planning no more than `ahead` segments in front of the segment that is being rendered."""

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._rendering = 0
        self._closed = False
        self._changed = asyncio.Condition()

    @property
    def _open(self) -> int:
        return self._rendering + self._ahead + 1

    async def admit(self, index: int) -> int:
        """Wait until segment `index` may be planned; see `Permit`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or index < self._open)
        return 0 if self._closed else self._open

    async def advance(self, index: int) -> None:
        """Segment `index` is being rendered now."""
        async with self._changed:
            self._rendering = index
            self._changed.notify_all()

    async def close(self) -> None:
        """Let everybody who waits go, with 0."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
