"""Admission, the queue and the life of every video. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import secrets
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from arlon_ray.config import Config
from arlon_ray.generation import SegmentText, new_frames, playing_time, prompt_of
from serve.jobs_store import JobStore
from serve.orchestrator import Orchestrator, StageError
from serve.schema import (
    RequestError,
    SegmentState,
    SegmentStatus,
    SegmentTimes,
    Video,
    VideoError,
    VideoRequest,
    options_of,
    read_prompts,
)
from serve.work import Job, Stages, Timed

logger = logging.getLogger("ray.serve")

#: Share of the progress, in percent, that a segment in this state has made.
_PROGRESS: dict[SegmentStatus, int] = {"queued": 0, "planned": 10, "rendering": 10, "rendered": 90, "completed": 100}
_PIECE = 2**16  # bytes of a stream that are sent at once
_FIRST_GUESS_S = 10.0  # length of a job, before one has finished


@dataclass(eq=False)
class _Active:
    """A video that is waiting or being made, and what its orchestrator tells (a `Watcher`)."""

    video: Video
    job: Job
    store: JobStore
    began: float = 0.0  # Unix seconds
    task: asyncio.Task[None] | None = None
    saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    pending: asyncio.Task[None] | None = None  # a save that has not yet looked at the video
    partial: Path | None = None  # the file that grows
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # the next change sets it; a new one takes its place
    ended: bool = False

    async def save(self) -> None:
        # one after the other, or an older state might be written last; a copy, for the video changes meanwhile
        async with self.saving:
            self.pending = None
            await asyncio.to_thread(self.store.save, self.video.model_copy(deep=True))

    def save_soon(self) -> None:
        """Write the state without keeping the work waiting; changes that come together are written together."""
        if self.pending is None:
            self.pending = asyncio.create_task(self.save())

    def tell(self, ended: bool = False) -> None:
        """Wake all who wait for a change."""
        self.ended = self.ended or ended
        self.changed.set()
        self.changed = asyncio.Event()

    async def started(self) -> None:
        if self.video.status == "queued":
            self.began = time.time()
            self.video.status, self.video.started_at = "in_progress", int(self.began)
            self.save_soon()

    async def segment(
        self, index: int, status: SegmentStatus, stage: str | None = None, times: Timed | None = None
    ) -> None:
        self.video.segments[index].status = status
        if stage and times:
            timing = self.video.timings[index]
            setattr(timing, f"{stage}_start_s", round(times.started - self.began, 3))
            setattr(timing, f"{stage}_s", round(times.seconds, 3))
        done = sum(_PROGRESS[segment.status] for segment in self.video.segments)
        # 100 is for a file that can be fetched
        self.video.progress = min(99, done // len(self.video.segments))
        self.save_soon()
        self.tell()


class VideoService:
    """Makes at most `config.serve.max_running` videos at once; `max_queued` more may wait."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        stages: Stages,
        folder: Path,
        count_tokens: Callable[[str], int] | None = None,
    ) -> None:
        """Each video gets a folder of its own in `folder`. Videos that an earlier process left are marked failed.

        With `count_tokens`, prompts with more tokens than the text encoder takes are refused.
        """
        self._config, self._store, self._stages, self._folder = config, store, stages, folder
        self._count_tokens = count_tokens
        self._waiting: dict[str, _Active] = {}
        self._running: dict[str, _Active] = {}
        self._arriving = 0
        self._mean_seconds = _FIRST_GUESS_S
        for video_id in store.fail_unfinished():
            shutil.rmtree(folder / video_id, ignore_errors=True)

    def counts(self) -> dict[str, int]:
        """How many videos wait and are being made."""
        return {"queued": len(self._waiting) + self._arriving, "running": len(self._running)}

    async def create(self, request: VideoRequest) -> Video:
        """Accept a video. Raises RequestError: a bad field (422), or too many waiting (429)."""
        prompts = read_prompts(request, self._config, self._count_tokens)
        self._refuse_if_full()
        self._arriving += 1
        try:
            active = self._new(request, prompts)
            accepted = active.video.model_copy(deep=True)
            await asyncio.to_thread(self._store.add, accepted, request)
        finally:
            self._arriving -= 1
        self._waiting[accepted.id] = active
        self._start_waiting()
        return accepted

    async def get(self, video_id: str) -> Video:
        """Raises RequestError (404)."""
        video = await asyncio.to_thread(self._store.get, video_id)
        if video is None:
            raise _unknown(video_id)
        return video

    async def page(self, after: str | None, limit: int, newest_first: bool) -> tuple[list[Video], bool]:
        """Videos in the order they were made, and whether there are more. Raises RequestError for `after`."""
        try:
            return await asyncio.to_thread(self._store.page, after=after, limit=limit, newest_first=newest_first)
        except KeyError:
            raise RequestError(f"no video {after!r}", param="after", code="not_found") from None

    async def content(self, video_id: str) -> Path:
        """The mp4. Raises RequestError: unknown (404), not finished or failed (409)."""
        video = await self.get(video_id)
        if video.status != "completed":
            message = f"the video is {video.status}: it has no content" + ("" if video.status == "failed" else " yet")
            raise RequestError(message, param="video_id", code=f"video_{video.status}", status=409)
        return self._folder / video_id / "video.mp4"

    async def stream(self, video_id: str) -> AsyncIterator[bytes]:
        """The video as it is made: a fragmented mp4, segment by segment; the file of one that is finished.

        Ends where the making ends, if it fails or is stopped. Raises RequestError: unknown (404), failed (409).
        """
        active = self._waiting.get(video_id) or self._running.get(video_id)
        file = await self._grown(active) if active else (await self.content(video_id)).open("rb")
        return self._pieces(file, active)

    async def _grown(self, active: _Active) -> BinaryIO:
        """The file of a video that is being made, as soon as there is one, or the finished one."""
        while True:
            changed = active.changed
            with suppress(FileNotFoundError):
                if active.partial:
                    return active.partial.open("rb")
            if active.ended:
                return (await self.content(active.video.id)).open("rb")
            await changed.wait()

    async def _pieces(self, file: BinaryIO, active: _Active | None) -> AsyncIterator[bytes]:
        with file:  # what is open can be read to its end, whoever renames or removes it
            while True:
                changed, ended = (active.changed, active.ended) if active else (None, True)
                while piece := await asyncio.to_thread(file.read, _PIECE):
                    yield piece
                if ended or changed is None:
                    return
                await changed.wait()

    async def delete(self, video_id: str) -> None:
        """Forget a video. One that is being made is stopped: no denoising step begins after the one at work.

        Raises RequestError (404).
        """
        await self.get(video_id)
        active = self._waiting.pop(video_id, None) or self._running.get(video_id)
        if active and active.task:
            active.task.cancel()
            await asyncio.wait({active.task})
        if not await asyncio.to_thread(self._store.delete, video_id):
            raise _unknown(video_id)
        if active:
            active.tell(ended=True)
        await asyncio.to_thread(shutil.rmtree, self._folder / video_id, True)

    async def close(self) -> None:
        """Stop all work. What was unfinished is marked so when the service starts again."""
        all_active = [*self._waiting.values(), *self._running.values()]
        self._waiting.clear()
        tasks = {active.task for active in all_active if active.task}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for active in all_active:
            active.tell(ended=True)
        self._store.close()

    def _refuse_if_full(self) -> None:
        settings = self._config.serve
        free = settings.max_running - len(self._running)
        waiting = len(self._waiting) + self._arriving
        if waiting < settings.max_queued + free:
            return
        retry_after_s = max(1, math.ceil(self._mean_seconds / settings.max_running))
        raise RequestError(
            f"{waiting} videos are waiting already, try again in {retry_after_s} s",
            code="queue_full",
            status=429,
            retry_after_s=retry_after_s,
        )

    def _new(self, request: VideoRequest, prompts: list[SegmentText]) -> _Active:
        config = self._config
        said = [part.prompt for part in request.segments or ()] or [request.prompt or ""]
        video = Video(
            id=f"video_{uuid.uuid4().hex}",
            model=config.name,
            created_at=int(time.time()),
            seconds=playing_time(len(prompts), config),
            size=f"{config.video.width}x{config.video.height}",
            prompt="\n".join(dict.fromkeys(prompt.strip() for prompt in said)),
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            baseline=request.baseline,
            user=request.user,
            segments=[
                SegmentState(
                    index=index,
                    prompt=prompt_of(text, config.segment.overlap_latents if index else 0),
                    frames=new_frames(config, index),
                )
                for index, text in enumerate(prompts)
            ],
            timings=[SegmentTimes(index=index) for index in range(len(prompts))],
        )
        job = Job(video.id, tuple(prompts), video.seed, options_of(request, config))
        return _Active(video, job, self._store)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._config.serve.max_running:
            active = self._waiting.pop(next(iter(self._waiting)))
            self._running[active.video.id] = active
            # an empty context: Serve ties calls to the HTTP request in whose context they are made, and this work
            # outlives it
            active.task = asyncio.create_task(self._make(active), context=contextvars.Context())
            active.task.add_done_callback(partial(self._finished, active))

    def _finished(self, active: _Active, task: asyncio.Task[None]) -> None:
        del self._running[active.video.id]
        if not task.cancelled():  # who stops it says so, when its traces are gone
            active.tell(ended=True)
        self._start_waiting()

    async def _make(self, active: _Active) -> None:
        video, config = active.video, self._config
        orchestrator = Orchestrator(
            active.job,
            self._stages,
            self._folder / video.id,
            active,
            overlap_latents=config.segment.overlap_latents,
            planned_ahead=config.serve.planned_ahead,
        )
        active.partial = orchestrator.partial
        try:
            await orchestrator.run()
            video.status, video.progress = "completed", 100
            self._mean_seconds = 0.7 * self._mean_seconds + 0.3 * (time.time() - active.began)
        except StageError as error:
            logger.exception("%s failed", video.id)
            video.error = VideoError(code="generation_failed", message=str(error))
        except Exception:
            logger.exception("%s failed", video.id)
            video.error = VideoError(code="internal_error", message="the video could not be made; see the server's log")
        if video.error:
            video.status = "failed"
            await asyncio.to_thread(shutil.rmtree, self._folder / video.id, True)
        video.completed_at = int(time.time())
        await active.save()


def _unknown(video_id: str) -> RequestError:
    return RequestError(f"no video {video_id[:64]!r}", param="video_id", code="not_found", status=404)
