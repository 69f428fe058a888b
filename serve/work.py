"""What one video's work is made of, whoever does it: Ray Serve deployments, or a test in one process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from arlon_ray.generation import GenerationOptions, SegmentText

T = TypeVar("T")
Tokens = NDArray[np.int32]  # [t', h', w'] of one segment
Latents = NDArray[np.float32]  # [C, n, h, w]
Frame = NDArray[np.uint8]  # [H, W, 3]

#: Asked before each segment is planned: waits until the plan may go on; False: nobody waits for it any more.
Permit = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True)
class Job:
    """One video: the text of each segment, and how it is made."""

    id: str
    prompts: tuple[SegmentText, ...]
    seed: int
    options: GenerationOptions


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
    """The three steps of making a video."""

    def plan(self, job: Job, permit: Permit) -> AsyncIterator[Timed[Tokens]]:
        """The tokens of one segment after the other."""

    async def render(self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None) -> Timed[Latents]:
        """The new latents of segment `index`; `overlap` are the latents before it, None for the first segment."""

    async def decode(self, job: Job, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        """An mp4 fragment; `before` is the last frame of the segment before, None for the first."""


class PlanWindow:
    """Keeps planning no more than `ahead` segments in front of the segment that is being rendered."""

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._rendering = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def admit(self, index: int) -> bool:
        """Wait until segment `index` may be planned. False: the video is finished or given up."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or index <= self._rendering + self._ahead)
        return not self._closed

    async def advance(self, index: int) -> None:
        """Segment `index` is being rendered now."""
        async with self._changed:
            self._rendering = index
            self._changed.notify_all()

    async def close(self) -> None:
        """Let everybody who waits go, with False."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
