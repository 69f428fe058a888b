"""One video: the AR plans segment k+1 while the DiT renders segment k and the decoder writes segment k-1."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

import numpy as np

from arlon_ray.generation import behind_overlap
from arlon_ray.generation.video import GrowingVideo
from serve.schema import SegmentStatus
from serve.work import Frame, Job, Latents, PlanWindow, Stages, Timed, Tokens


class StageError(RuntimeError):
    """A step of one segment failed. The text is fit for clients; the cause is not."""

    def __init__(self, stage: str, index: int, cause: BaseException) -> None:
        # Ray wraps what a replica raised
        cause = getattr(cause, "cause", None) or cause
        super().__init__(f"segment {index}: {stage} failed ({type(cause).__name__})")
        self.stage, self.index = stage, index


class Watcher(Protocol):
    """Is told what happens to the segments."""

    async def started(self) -> None:
        """The first piece of work has begun."""

    async def segment(
        self, index: int, status: SegmentStatus, stage: str | None = None, times: Timed | None = None
    ) -> None:
        """Segment `index` is `status` now; `times` are those of `stage` ("ar", "dit", "decode"), if one has ended."""


class Orchestrator:
    """Makes one video out of the three stages. Holds the latents of one segment, whatever the length of the video."""

    def __init__(
        self, job: Job, stages: Stages, folder: Path, watcher: Watcher, *, overlap_latents: int, planned_ahead: int
    ) -> None:
        """`video.mp4` is written to `folder`; until it is finished it grows there as `partial`."""
        self._job, self._stages, self._folder, self._watcher = job, stages, folder, watcher
        self._overlap_latents = overlap_latents
        self._file = GrowingVideo(folder / "video.mp4")
        self._window = PlanWindow(planned_ahead)
        # bounded by the window: nothing is planned that the window does not admit
        self._planned: asyncio.Queue[Tokens] = asyncio.Queue()

    @property
    def partial(self) -> Path:
        """The segments that are done: a fragmented mp4, which is there from the first one on until the last is."""
        return self._file.partial

    async def may_plan(self, index: int) -> bool:
        """What the AR asks before it plans segment `index`: waits for the window; False ends the plan."""
        admitted = await self._window.admit(index)
        if admitted and index == 0:
            await self._watcher.started()
        return admitted

    async def run(self) -> Path:
        """Make the video. Cancelling it cancels the work of all stages.

        Raises StageError for the first step that fails.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.TaskGroup() as group:
                if self._job.options.baseline:
                    await self._watcher.started()
                else:
                    group.create_task(self._plan())
                await self._render(group)
            return await asyncio.to_thread(self._file.finish)
        except ExceptionGroup as failures:
            raise _first(failures) from failures
        finally:
            await self._window.close()

    async def _plan(self) -> None:
        index = 0
        stream = self._stages.plan(self._job, self.may_plan)
        try:
            async for planned in stream:
                await self._watcher.segment(index, "planned", "ar", planned)
                self._planned.put_nowait(planned.value)
                index += 1
        except Exception as error:
            raise StageError("planning", index, error) from error
        finally:
            # closing the stream is what cancels the request behind it
            await stream.aclose()  # type: ignore[attr-defined]
        if index < len(self._job.prompts):
            raise StageError("planning", index, EOFError("the plan ended early"))

    async def _render(self, group: asyncio.TaskGroup) -> None:
        """Render segment by segment; decoding runs one segment behind."""
        overlap: Latents | None = None
        decoding: asyncio.Task[Frame] | None = None
        for index in range(len(self._job.prompts)):
            tokens = None if self._job.options.baseline else await self._planned.get()
            await self._window.advance(index)
            await self._watcher.segment(index, "rendering")
            try:
                rendered = await self._stages.render(self._job, index, tokens, overlap)
            except Exception as error:
                raise StageError("rendering", index, error) from error
            await self._watcher.segment(index, "rendered", "dit", rendered)
            latents = rendered.value
            overlap = np.ascontiguousarray(behind_overlap(overlap, latents)[:, -self._overlap_latents :])
            before = await decoding if decoding else None
            decoding = group.create_task(self._decode(index, latents, before))

    async def _decode(self, index: int, latents: Latents, before: Frame | None) -> Frame:
        try:
            decoded = await self._stages.decode(self._job, latents, before)
            await asyncio.to_thread(self._file.add, decoded.value.fragment)
        except Exception as error:
            raise StageError("decoding", index, error) from error
        await self._watcher.segment(index, "completed", "decode", decoded)
        return decoded.value.last


def _first(failures: BaseExceptionGroup) -> BaseException:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
