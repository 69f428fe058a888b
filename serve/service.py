"""Admission, the queue and the life of every video and draft. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from arlon_ray.config import Config
from serve import new_jobs
from serve.active import Active
from serve.blobs import Blobs
from serve.callers import LOCAL, Caller
from serve.fair_queue import FairQueue
from serve.job_files import JobFiles, SegmentRecord
from serve.job_store import JobStore, Stored
from serve.logs import REQUEST_ID
from serve.metrics import Metrics
from serve.orchestrator import Orchestrator, StageError
from serve.reader import VideoReader, unknown
from serve.schema import (
    ExtendRequest,
    PlanRequest,
    RemixRequest,
    RequestError,
    RerollRequest,
    Video,
    VideoError,
    VideoRequest,
)
from serve.work import Frame, Stages

logger = logging.getLogger("ray.serve")

_FIRST_GUESS_S = 10.0  # length of a job, before one has finished
_CLEANING_S = 60.0  # between looks for what has expired
_LATE = VideoError(code="deadline_exceeded", message="the video was not finished before its deadline")
_OTHER_MODEL = VideoError(
    code="model_changed", message="it was made with another model than the one that is served now"
)


class VideoService(VideoReader):
    """Makes at most `config.serve.max_running` videos at once; `max_queued` more may wait."""

    def __init__(
        self,
        config: Config,
        store: JobStore,
        stages: Stages,
        blobs: Blobs,
        count_tokens: Callable[[str], int] | None = None,
        metrics: Metrics | None = None,
        bundle: str = "",
    ) -> None:
        """With `count_tokens`, prompts with more tokens than the text encoder takes are refused.

        `bundle` is the fingerprint of the one that `stages` run.
        """
        self.metrics = metrics or Metrics()
        super().__init__(store, blobs)
        self._config, self._stages = config, stages
        self._count_tokens, self._bundle = count_tokens, bundle
        self._waiting = FairQueue()
        self._running: dict[str, Active] = {}
        self._arriving = 0
        self._mean_seconds = _FIRST_GUESS_S
        self._cleaning: asyncio.Task[None] | None = None
        self._rerolling = asyncio.Lock()

    async def start(self) -> None:
        """Go on with all that an earlier process has accepted, each behind its last finished segment."""
        for stored in await asyncio.to_thread(self._store.unfinished):
            active = self._active(stored)
            active.restored(await asyncio.to_thread(self._store.events, stored.video.id))
            active.began = float(stored.video.started_at or 0)
            if stored.job.bundle == self._bundle or await self._begin_again(active):
                self._enqueue(active)
        self._cleaning = asyncio.create_task(self._clean(), context=contextvars.Context())

    async def _begin_again(self, active: Active) -> bool:
        """Another bundle has begun it: all over, or, if it goes on from something of the other's, not at all."""
        video = active.video
        if video.draft_id or video.extended_from_video_id:
            await self._fail(active, _OTHER_MODEL)
            return False
        logger.warning("%s was begun with another bundle: it is made from nothing", video.id)
        await asyncio.to_thread(self._files(video.id).forget_all)
        for segment in video.segments:
            segment.status = "queued"
        video.progress = 0
        active.job = replace(active.job, bundle=self._bundle, anew=())
        await active.save(active.job)
        return True

    def _check_bundle(self, stored: Stored) -> Stored:
        """Raises RequestError for what another bundle has made, which this one cannot go on from."""
        if stored.job.bundle != self._bundle:
            raise RequestError(_OTHER_MODEL.message, code=_OTHER_MODEL.code, status=409)
        return stored

    def counts(self) -> dict[str, int]:
        """How many videos wait and are being made."""
        return {"queued": len(self._waiting) + self._arriving, "running": len(self._running)}

    # ---- asking

    async def create(
        self,
        request: PlanRequest,
        caller: Caller = LOCAL,
        picture: Frame | None = None,
        idempotency_key: str | None = None,
        request_id: str = "",
    ) -> Video:
        """Accept a video, or a draft (a request that is no VideoRequest).

        `picture` uint8 [H, W, 3], of the model's size, is the first frame. The same key and request of the same caller
        is the same video. Raises RequestError: a bad field (422), a key that was used otherwise (409), too many (429).
        """
        source = None
        if isinstance(request, VideoRequest) and request.draft is not None:
            source = self._check_bundle(await self._finished(request.draft, caller, "draft"))
            new = new_jobs.rendered(source, request, self._config)
        else:
            new = new_jobs.asked(request, self._config, self._count_tokens)

        def prepare(files: JobFiles) -> None:
            if picture is not None:
                files.write_picture(picture)
            if source is not None:
                self._take_over(source.job.id, files)

        digest = hashlib.sha256(request.model_dump_json().encode() + (b"" if picture is None else picture.tobytes()))
        kept = Stored(*new, caller.name, _deadline(request), idempotency_key, digest.hexdigest())
        return await self._accept(kept, caller, request_id, prepare)

    async def remix(self, video_id: str, request: RemixRequest, caller: Caller = LOCAL, request_id: str = "") -> Video:
        """Accept the same video with another text. Raises RequestError."""
        stored = await self.stored(video_id, caller, "video")
        new = new_jobs.remixed(stored, request, self._config, self._count_tokens)
        picture = await asyncio.to_thread(self._files(video_id).picture)

        def prepare(files: JobFiles) -> None:
            if picture is not None:
                files.write_picture(picture)

        return await self._accept(Stored(*new, caller.name), caller, request_id, prepare)

    async def extend(self, request: ExtendRequest, caller: Caller = LOCAL, request_id: str = "") -> Video:
        """Accept a finished video with more behind it. Raises RequestError."""
        stored = self._check_bundle(await self._finished(request.video.id, caller, "video"))
        new = new_jobs.extended(stored, request, self._config, self._count_tokens)
        prepare = partial(JobFiles.go_on_from, other=self._files(stored.video.id))
        return await self._accept(Stored(*new, caller.name), caller, request_id, prepare)

    async def reroll(self, draft_id: str, index: int, request: RerollRequest, caller: Caller = LOCAL) -> Video:
        """Plan a segment of a draft anew. Raises RequestError; 409 while the draft is being made."""
        async with self._rerolling:  # or two would find it finished
            stored = self._check_bundle(await self._finished(draft_id, caller, "draft"))
            video, job = new_jobs.rerolled(stored, index, request, self._config, self._count_tokens)
            self._refuse_if_full(caller)
            active = self._active(replace(stored, video=video, job=job, deadline=None))
            active.restored(await asyncio.to_thread(self._store.events, draft_id))
            active.tell("segment.reset", index=index)
            await active.save(job)
        accepted = video.model_copy(deep=True)
        self._enqueue(active)
        return accepted

    async def _accept(self, new: Stored, caller: Caller, request_id: str, prepare: Callable[[JobFiles], None]) -> Video:
        """Write the job down, with what it starts from, and let it wait for its turn."""
        if new.idempotency_key is not None:
            earlier = await asyncio.to_thread(self._store.find, caller.name, new.idempotency_key)
            if earlier:
                return _same(earlier, new)
        self._refuse_if_full(caller)
        self._arriving += 1
        try:
            new.job = replace(new.job, request_id=request_id, bundle=self._bundle)
            await asyncio.to_thread(prepare, self._files(new.video.id))
            accepted = new.video.model_copy(deep=True)
            if earlier := await asyncio.to_thread(self._store.add, new):
                await asyncio.to_thread(self._files(new.video.id).delete)
                return _same(earlier, new)
        finally:
            self._arriving -= 1
        self._enqueue(self._active(new, caller))
        return accepted

    def _take_over(self, draft_id: str, files: JobFiles) -> None:
        """A draft's plan, and the picture it starts from."""
        draft = self._files(draft_id)
        for index, record in draft.segments():
            files.write_segment(index, SegmentRecord(record.tokens))
        if (picture := draft.picture()) is not None:
            files.write_picture(picture)

    def _refuse_if_full(self, caller: Caller) -> None:
        settings = self._config.serve
        waiting, own = len(self._waiting) + self._arriving, self._waiting.of(caller.name)
        free = settings.max_running - len(self._running)
        retry_after_s = max(1, math.ceil(self._mean_seconds / settings.max_running))
        if waiting >= settings.max_queued + free:
            message, code = f"{waiting} videos are waiting already, try again in {retry_after_s} s", "queue_full"
        elif own >= settings.max_queued_per_key + free:
            message, code = f"{own} videos of this key are waiting already", "too_many_queued"
        else:
            return
        raise RequestError(message, code=code, status=429, retry_after_s=retry_after_s)

    async def stop(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> None:
        """Delete a video that is not finished: nobody waits for it any more. One that is finished stays."""
        if self._find(video_id):
            with suppress(RequestError):  # it was deleted meanwhile
                await self.delete(video_id, caller, kind)

    async def delete(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> None:
        """Forget a video. One that is being made is stopped: no denoising step begins after the one at work.

        Raises RequestError (404).
        """
        await self.stored(video_id, caller, kind)
        active = self._waiting.remove(video_id) or self._running.get(video_id)
        if active and active.task:
            active.task.cancel()
            await asyncio.wait({active.task})
        if not await asyncio.to_thread(self._store.delete, video_id):
            raise unknown(video_id, kind)
        if active:
            active.tell("deleted", ended=True)
            self.metrics.finished("deleted")
            self._tell_positions()
        await asyncio.to_thread(self._files(video_id).delete)

    def _find(self, video_id: str) -> Active | None:
        return self._waiting.get(video_id) or self._running.get(video_id)

    # ---- making

    def _active(self, stored: Stored, owner: Caller | None = None) -> Active:
        owner = owner or Caller(stored.owner)
        return Active(stored.video, stored.job, owner, self._store, self.metrics, stored.deadline)

    def _enqueue(self, active: Active) -> None:
        self._waiting.add(active)
        if active.deadline is not None:
            asyncio.get_running_loop().call_later(max(0.0, active.deadline - time.time()), self._expire, active)
        self._start_waiting()

    def _start_waiting(self) -> None:
        while len(self._waiting) and len(self._running) < self._config.serve.max_running:
            active = self._waiting.pop(self._running.values())
            self._running[active.video.id] = active
            # an empty context: Serve ties calls to the HTTP request in whose context they are made, and this work
            # outlives it
            active.task = asyncio.create_task(self._make(active), context=contextvars.Context())
            active.task.add_done_callback(partial(self._ended, active))
        self._tell_positions()

    def _tell_positions(self) -> None:
        self.metrics.queue(len(self._waiting), len(self._running))
        for position, active in enumerate(self._waiting.order(self._running.values())):
            active.queued_at(position + len(self._running))

    def _ended(self, active: Active, task: asyncio.Task[None]) -> None:
        del self._running[active.video.id]
        if not task.cancelled():  # who stops it says so, when its traces are gone
            active.tell(ended=True)
        self._start_waiting()

    def _expire(self, active: Active) -> None:
        """The deadline has come: what waits never begins; what is being made is stopped."""
        if self._waiting.remove(active.video.id):
            self._running[active.video.id] = active
            active.task = asyncio.create_task(self._fail(active, _LATE), context=contextvars.Context())
            active.task.add_done_callback(partial(self._ended, active))

    async def _make(self, active: Active) -> None:
        video, config = active.video, self._config
        orchestrator = Orchestrator(
            active.job,
            self._stages,
            self._files(video.id),
            active,
            segment=config.segment,
            planned_ahead=config.serve.planned_ahead,
        )
        active.partial = orchestrator.partial
        REQUEST_ID.set(active.job.request_id)  # of the task alone: its lines are found by the id of the request
        try:
            left = None if active.deadline is None else active.deadline - time.time()
            async with asyncio.timeout(left):
                await orchestrator.run()
        except TimeoutError:
            await self._fail(active, _LATE)
        except StageError as error:
            logger.exception("%s failed", video.id)
            await self._fail(active, VideoError(code=error.code, message=str(error)))
        except Exception:
            logger.exception("%s failed", video.id)
            message = "the video could not be made; see the server's log"
            await self._fail(active, VideoError(code="internal_error", message=message))
        else:
            self._mean_seconds = 0.7 * self._mean_seconds + 0.3 * (time.time() - active.began)
            await active.finish(None, self._expires_at())
            self.metrics.finished("completed")

    async def _fail(self, active: Active, error: VideoError) -> None:
        await asyncio.to_thread(self._files(active.video.id).delete)
        await active.finish(error, self._expires_at())
        self.metrics.failure(error.code)

    def _expires_at(self) -> int | None:
        hours = self._config.serve.keep_hours
        return None if hours is None else int(time.time() + 3600 * hours)

    async def _clean(self) -> None:
        """Remove what has expired, now and then."""
        while True:
            try:
                for job_id in await asyncio.to_thread(self._store.expired):
                    await asyncio.to_thread(self._store.delete, job_id)
                    await asyncio.to_thread(self._files(job_id).delete)
            except Exception:
                logger.exception("what has expired could not be removed")
            await asyncio.sleep(_CLEANING_S)

    async def close(self) -> None:
        """Stop all work. What is unfinished goes on when the service starts again."""
        all_active = [*self._waiting, *self._running.values()]  # type: ignore[misc]
        self._waiting = FairQueue()
        tasks = {task for task in (self._cleaning, *(active.task for active in all_active)) if task}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for active in all_active:
            active.tell(ended=True)
        self._store.close()


def _same(earlier: Stored, new: Stored) -> Video:
    if earlier.request_digest != new.request_digest:
        message = "this Idempotency-Key was used for another request"
        raise RequestError(message, param="Idempotency-Key", code="idempotency_conflict", status=409)
    return earlier.video


def _deadline(request: PlanRequest) -> float | None:
    return None if request.deadline_s is None else time.time() + request.deadline_s
