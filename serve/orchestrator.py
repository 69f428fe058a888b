"""One video: the AR plans segment k+1 while the DiT renders segment k and the decoder writes segment k-1.

What is finished is kept (`JobFiles`), so that the same job goes on behind it wherever and whenever it is run again: the
result is the same, because every segment follows from its seed and from what is kept of the segments before it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from arlon_ray.config import Config
from arlon_ray.generation import HandOver, begins_shot, behind_overlap
from serve.job_files import JobFiles, Restored, SegmentRecord
from serve.metrics import Stage
from serve.schema import STORAGE_FULL, SegmentStatus
from serve.tracing import span
from serve.work import Frame, Job, Latents, PlanWindow, Stages, Timed, Tokens, WorkerLost

T = TypeVar("T")

logger = getLogger("ray.serve")

RETRIES = 5  # calls made again for one segment where the replica at work is lost
_PAUSE_S = 0.5  # before the first of them; doubled each time


class StageError(RuntimeError):
    """A step of one segment failed. The text is fit for clients; the cause is not."""

    def __init__(self, stage: str, index: int, cause: BaseException) -> None:
        # Ray wraps what a replica raised
        cause = getattr(cause, "cause", None) or cause
        super().__init__(f"segment {index}: {stage} failed ({type(cause).__name__})")
        self.stage, self.index = stage, index
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        self.code = STORAGE_FULL if full else "generation_failed"


class Watcher(Protocol):
    """Is told what happens to the segments."""

    async def started(self, done: int) -> None:
        """The first piece of work has begun; `done` segments were finished before."""

    async def segment(
        self, index: int, status: SegmentStatus, stage: Stage | None = None, times: Timed | None = None
    ) -> None:
        """Segment `index` is `status` now; `times` are those of `stage` ("ar", "dit", "decode"), if one has ended."""

    async def step(self, index: int, step: int) -> None:
        """The DiT is evaluated (from 1) for segment `index`."""


class Orchestrator:
    """Makes one video or draft. Holds the latents of one segment, whatever the length of the video."""

    def __init__(
        self,
        job: Job,
        stages: Stages,
        files: JobFiles,
        watcher: Watcher,
        *,
        config: Config,
        planned_ahead: int,
    ) -> None:
        self._job, self._stages, self._files, self._watcher = job, stages, files, watcher
        self._segment, self._hand_over = config.segment, HandOver.of(config, job.prompts)
        self._window = PlanWindow(planned_ahead)
        # bounded by the window: nothing is planned that the window does not admit
        self._planned: asyncio.Queue[Tokens] = asyncio.Queue()
        self._state = Restored()
        self._given: Latents | None = None
        self._next = 0  # the segment whose tokens come into the queue next
        self._started = False

    @property
    def partial(self) -> Path:
        """The segments that are done: a fragmented mp4, which is there from the first one on until the last is."""
        return self._files.growing.partial

    async def may_plan(self, index: int) -> int:
        """What the AR asks before it plans segment `index`, a `Permit`: waits for the window."""
        admitted = await self._window.admit(index)
        if admitted:
            await self._begin()
        return admitted

    async def told(self, index: int, step: int) -> None:
        """What the DiT tells when an evaluation begins."""
        await self._watcher.step(index, step)

    async def run(self) -> None:
        """Make the video, or what is left of it. Cancelling it cancels the work of all stages.

        Raises StageError for the first step that fails.
        """
        if self._job.anew:
            await self._filed(0, partial(self._files.forget, self._job.anew))
        elif await self._filed(0, lambda: self._files.finished):
            return
        self._state = await self._filed(0, self._files.restore)
        await self._window.advance(self._state.done)
        try:
            await self._start_from_picture()
            async with asyncio.TaskGroup() as group:
                if self._job.options.baseline:
                    await self._begin()
                else:
                    group.create_task(self._plan())
                await (self._preview() if self._job.draft else self._render(group))
            await self._filed(self._state.done - 1, partial(self._files.finish, self._state, self._job.draft))
        except ExceptionGroup as failures:
            raise _first(failures) from failures
        finally:
            await self._window.close()

    async def _begin(self) -> None:
        if not self._started:
            self._started = True
            await self._watcher.started(self._state.done)

    async def _start_from_picture(self) -> None:
        self._given = await self._filed(0, self._files.given)
        picture = None if self._given is not None else await self._filed(0, self._files.picture)
        if picture is None:
            return
        encoded = await self._lasting("encoding", 0, lambda: self._stages.encode(self._job, picture))
        self._given = encoded.value
        await self._filed(0, partial(self._files.write_given, self._given))

    async def _filed(self, index: int, call: Callable[[], T]) -> T:
        """Read or write files in a thread, again where storage is away for a while. Raises StageError."""
        return await self._lasting("storage", index, lambda: _in_thread(call), _storage_away)

    async def _lasting(
        self,
        stage: str,
        index: int,
        call: Callable[[], Awaitable[T]],
        passing: Callable[[Exception], bool] = lambda error: isinstance(error, WorkerLost),
    ) -> T:
        """Make a call of a segment, again where it failed for a reason that is `passing`. Raises StageError."""
        for again in range(RETRIES + 1):
            try:
                with span(stage, job=self._job.id, segment=index, again=again):
                    return await call()
            except Exception as error:
                if again == RETRIES or not passing(error):
                    raise StageError(stage, index, error) from error
                await self._pause(stage, index, again)
        raise AssertionError("unreachable")

    async def _pause(self, stage: str, index: int, again: int) -> None:
        logger.warning("%s: segment %d: %s was lost: once more", self._job.id, index, stage)
        await asyncio.sleep(_PAUSE_S * 2**again)

    async def _plan(self) -> None:
        """Put the tokens of all segments that are not finished into the queue: those that are there, and new ones."""
        tokens, lost, self._next = self._state.tokens, 0, self._state.done
        while (index := self._next) < len(self._job.prompts):
            # before the AR is asked: a plan that waits keeps a replica from being taken away
            if not await self._window.admit(index):
                return
            try:
                if index not in tokens:
                    with span("planning", job=self._job.id, segment=index, again=lost):
                        await self._plan_from(index)
                else:
                    await self._begin()
                    await self._put(index, self._behind(tokens[index - 1], tokens[index]) if index else tokens[index])
            except WorkerLost as error:
                lost = lost + 1 if self._next == index else 1
                if lost > RETRIES:
                    raise StageError("planning", index, error) from error
                await self._pause("planning", self._next, lost - 1)
            except StageError:
                raise
            except Exception as error:
                raise StageError("planning", index, error) from error

    async def _plan_from(self, index: int) -> None:
        """Plan segments from `index` on with the AR, as far as one seed goes and no tokens are there."""
        job, tokens = self._job, self._state.tokens
        known = [tokens[i] for i in range(index)]
        stream = self._stages.plan(job.planned_with(index), self.may_plan, known, self._given)
        try:
            async for planned in stream:
                await self._put(self._next, planned.value, planned)
                following = self._next
                if following in tokens or job.plan_seed(following) != job.plan_seed(index):
                    break
        finally:
            # closing the stream is what cancels the request behind it
            await stream.aclose()  # type: ignore[attr-defined]
        if self._next == index:
            raise EOFError("the plan ended early")

    async def _put(self, index: int, tokens: Tokens, times: Timed | None = None) -> None:
        self._state.tokens[index], self._next = tokens, index + 1
        if self._job.draft:  # what a draft is; a video's plan can be had again
            await self._filed(index, partial(self._files.write_segment, index, SegmentRecord(tokens)))
        await self._watcher.segment(index, "planned", "ar", times)
        self._planned.put_nowait(tokens)

    def _behind(self, before: Tokens, tokens: Tokens) -> Tokens:
        """A segment's tokens, those of the overlap taken from the segment before: it may have been planned anew."""
        shared = self._overlap(tokens)
        return np.concatenate([before[-shared:], tokens[shared:]]) if shared else tokens

    def _overlap(self, tokens: Tokens) -> int:
        return len(tokens) * self._segment.overlap_groups // self._segment.groups

    async def _render(self, group: asyncio.TaskGroup) -> None:
        """Render segment by segment; decoding runs one segment behind."""
        handed = self._state.overlap if self._state.done else self._given
        decoding: asyncio.Task[Frame] | None = None
        for index in range(self._state.done, len(self._job.prompts)):
            tokens = None if self._job.options.baseline else await self._planned.get()
            await self._window.advance(index)
            await self._watcher.segment(index, "rendering")
            taken = self._hand_over.taken(handed, index)
            latents = await self._rendered(index, tokens, taken)
            handed = np.ascontiguousarray(self._hand_over.after(taken, latents, index))
            if index == 0:
                latents = behind_overlap(taken, latents)  # what it starts from is its first frame
            before = await decoding if decoding else self._state.last
            decoding = group.create_task(self._decode(index, tokens, latents, handed, before))

    async def _rendered(self, index: int, tokens: Tokens | None, overlap: Latents | None) -> Latents:
        def call() -> Awaitable[Timed[Latents]]:
            return self._stages.render(self._job, index, tokens, overlap, self.told)

        rendered = await self._lasting("rendering", index, call)
        await self._watcher.segment(index, "rendered", "dit", rendered)
        return rendered.value

    async def _decode(
        self, index: int, tokens: Tokens | None, latents: Latents, overlap: Latents, before: Frame | None
    ) -> Frame:
        last = self._shown_before(index, before)
        decoded = await self._lasting("decoding", index, lambda: self._stages.decode(self._job, index, latents, last))
        frames = decoded.value
        await self._keep(index, SegmentRecord(tokens, overlap, frames.last, frames.fragment), decoded)
        return frames.last

    def _shown_before(self, index: int, last: Frame | None) -> Frame | None:
        """The frame before segment `index` that its first ones go on from: none behind a cut."""
        return None if begins_shot(self._job.prompts, index) else last

    async def _preview(self) -> None:
        """Decode segment by segment from the tokens alone."""
        before = self._state.last
        for index in range(self._state.done, len(self._job.prompts)):
            tokens = await self._planned.get()
            await self._window.advance(index)
            new = tokens[self._overlap(tokens) if index else 0 :]
            decoded = await self._lasting(
                "decoding",
                index,
                partial(self._stages.preview, self._job, index, new, self._shown_before(index, before)),
            )
            before = decoded.value.last
            await self._keep(index, SegmentRecord(tokens, None, before, decoded.value.fragment), decoded)

    async def _keep(self, index: int, record: SegmentRecord, times: Timed) -> None:
        """The segment is finished."""

        def write() -> None:
            self._files.write_segment(index, record)
            self._files.growing.add(record.fragment)

        await self._filed(index, write)
        self._state.done, self._state.overlap, self._state.last = index + 1, record.overlap, record.last
        await self._watcher.segment(index, "completed", "decode", times)


def _storage_away(error: Exception) -> bool:
    """A bucket may be away for a while; a full disk does not empty itself."""
    return isinstance(error, OSError) and error.errno != errno.ENOSPC


async def _in_thread(call: Callable[[], T]) -> T:
    """What a call gives. Who is cancelled meanwhile waits for the thread: others may remove the files then."""
    working = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait({working})
        raise


def _first(failures: BaseExceptionGroup) -> BaseException:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
