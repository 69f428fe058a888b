"""The queue and the life of every video and draft, from its turn to its end. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sqlalchemy.exc import SQLAlchemyError

from arlon_ray.config import Config
from serve.active import Active
from serve.blobs import Blobs
from serve.callers import LOCAL, Caller
from serve.cleaning import Cleaner, without_error
from serve.exchange import ServedModel, still_there
from serve.fair_queue import FairQueue
from serve.job_files import GIVEN
from serve.job_store import JobStore, Stored
from serve.logs import REQUEST_ID
from serve.metrics import Metrics
from serve.orchestrator import Orchestrator, StageError
from serve.owner import OwnerError, owner_of
from serve.places import Places
from serve.quotas import OTHER, Quotas, label
from serve.reader import VideoReader, kept_segments, unknown
from serve.schema import RequestError, Video, VideoError
from serve.tracing import span
from serve.work import Job, Stages

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

_FIRST_GUESS_S = 10.0  # length of a job, before one has finished
_CLEANING_S = 60.0  # between looks for what nobody needs any more
_LOOK_S = 1.0  # between looks whether the jobs are still this process's
_ANSWER_S = 10.0  # after which a database that does not say so has taken them away
_LATE = VideoError(code="deadline_exceeded", message="the video was not finished before its deadline")
OTHER_MODEL = VideoError(code="model_changed", message="it was made with another model than the one that is served now")


class VideoMaker(VideoReader):
    """Makes at most `config.serve.most_running` videos at once; `max_queued` more may wait.

    No other process makes those of the same database meanwhile: see `Owner`.
    """

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
        super().__init__(store, Places(blobs, config.serve.tenants))
        self._stages = stages
        self.model = ServedModel(config, bundle, count_tokens=count_tokens)
        self._waiting: FairQueue[Active] = FairQueue(config.serve.tenant)
        self._running: dict[str, Active] = {}
        self._arriving: Counter[str] = Counter()  # of each tenant
        self._quotas = Quotas(config.serve, store, self.metrics)
        self._at_work: set[asyncio.Task[Any]] = set()
        self._mean_seconds = _FIRST_GUESS_S
        self._cleaning: asyncio.Task[None] | None = None
        self._rerolling = asyncio.Lock()
        self._owner = owner_of(store.engine)
        # a thread of its own: work that keeps all others busy does not look like a database that is gone
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="owner")
        self._watching: asyncio.Task[None] | None = None
        #: Why the jobs may be another process's now: then this one makes and accepts none.
        self.lost = ""

    async def own(self) -> None:
        """Be the one that makes the jobs of this database. Raises OwnerError if another process is."""
        await asyncio.get_running_loop().run_in_executor(self._asking, self._owner.take)

    async def start(self) -> None:
        """Go on with all that an earlier process has accepted, each behind its last finished segment.

        Raises OwnerError as `own` does.
        """
        await self.own()
        for stored in await asyncio.to_thread(self._store.unfinished):
            active = self._active(stored)
            active.restored(await asyncio.to_thread(self._store.events, stored.video.id))
            active.began = float(stored.video.started_at or 0)
            if stored.job.bundle == self.model.bundle:
                self._label(active)  # it may lie elsewhere now
            elif _is_fresh(active) or not await self._has_its_bundle(active):
                if _goes_on(active):
                    await self._fail(active, OTHER_MODEL)
                    continue
                await self._begin_again(active)
            self._enqueue(active)
        self._cleaning = asyncio.create_task(self._clean(), context=contextvars.Context())
        if self._owner.may_be_lost:
            self._watching = asyncio.create_task(self._watch(), context=contextvars.Context())

    async def use(self, model: ServedModel) -> None:
        """Serve another bundle, of videos of the same shape. What has begun goes on with the bundle that began it."""
        self.model = model
        fresh = [active for active in self._waiting if _is_fresh(active)]
        encoded = await asyncio.to_thread(lambda: {each.id for each in fresh if self._files(each.job).exists(GIVEN)})
        for active in fresh:
            if active.id not in encoded and self._waiting.get(active.id) is active:
                self._label(active)
                active.save_soon()

    def _label(self, active: Active) -> None:
        """It is made by the bundle that is served."""
        active.job = replace(active.job, bundle=self.model.bundle, bundle_path=self.model.path)
        active.video.model, active.video.bundle = self.model.config.name, self.model.bundle[:12] or None

    async def _has_its_bundle(self, active: Active) -> bool:
        return await asyncio.to_thread(still_there, active.job, self.model.config)

    async def _begin_again(self, active: Active) -> None:
        """Another bundle has begun it, and is gone: all over, for the parts of one video are made by one bundle."""
        video = active.video
        logger.warning("%s was begun with another bundle: it is made from nothing", video.id)
        await asyncio.to_thread(self._files(active.job).forget_all)
        active.job = replace(active.job, anew=())
        self._label(active)
        if video.started_at is not None:
            active.tell("restarted", reason=OTHER_MODEL.code)
        for segment in video.segments:
            if segment.status != "queued":
                segment.status = "queued"
                active.tell("segment.reset", index=segment.index)
        video.progress = 0
        await active.save()

    def counts(self) -> dict[str, int]:
        """How many videos wait and are being made."""
        return {"queued": len(self._waiting) + self._arriving.total(), "running": len(self._running)}

    async def stop(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> None:
        """Delete a video that is not finished: nobody waits for it any more. One that is finished stays."""
        if self._find(video_id):
            with suppress(RequestError):  # it was deleted meanwhile
                await self.delete(video_id, caller, kind)

    async def delete(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> None:
        """Forget a video. One that is being made is stopped: no denoising step begins after the one at work.

        Raises RequestError (404).
        """
        await self._whole(self._delete(video_id, caller, kind))

    async def _delete(self, video_id: str, caller: Caller, kind: str) -> None:
        stored = await self.stored(video_id, caller, kind)
        # a draft that is just being enqueued again would be worked on when it is gone
        async with self._rerolling if kind == "draft" else nullcontext():
            # first, or a database that is away would leave a video that nobody works on
            if not await asyncio.to_thread(self._store.delete, video_id):
                raise unknown(video_id, kind)
        active = self._waiting.remove(video_id) or self._running.get(video_id)
        if active:
            active.stop_timer()
            if active.task:
                active.task.cancel()
                await asyncio.wait({active.task})
            active.tell("deleted", ended=True)
            self._note_end(active, "deleted")
            self._tell_positions()
        await asyncio.to_thread(without_error, self._files(stored.job).delete)

    def _find(self, video_id: str) -> Active | None:
        return self._waiting.get(video_id) or self._running.get(video_id)

    def _active(self, stored: Stored) -> Active:
        return Active(stored.video, stored.job, stored.owner, self._store, self.metrics, stored.deadline)

    def _enqueue(self, active: Active) -> None:
        self._waiting.add(active)
        if active.deadline is not None:
            left = max(0.0, active.deadline - time.time())
            active.timer = asyncio.get_running_loop().call_later(left, self._expire, active)
        self._start_waiting()

    def _start_waiting(self) -> None:
        while len(self._waiting) and len(self._running) < self.model.config.serve.most_running:
            active = self._waiting.pop(self._running.values())
            if active is None:  # all who wait have as many under way as they may
                break
            self._running[active.video.id] = active
            if active.video.started_at is None:
                waited_s = time.time() - active.video.created_at
                self.metrics.waited(label(self.model.config.serve, active.tenant), waited_s)
            # an empty context: Serve ties calls to the HTTP request in whose context they are made, and this work
            # outlives it
            active.task = asyncio.create_task(self._make(active), context=contextvars.Context())
            active.task.add_done_callback(partial(self._ended, active))
        self._tell_positions()

    def _tell_positions(self) -> None:
        self.metrics.queue(len(self._waiting), len(self._running))
        queued, running = self._by_tenant(self._waiting), self._by_tenant(self._running.values())
        for name in (*self.model.config.serve.tenants, OTHER):
            self.metrics.tenant_queue(name, queued[name], running[name])
        for position, active in enumerate(self._waiting.order(self._running.values())):
            active.queued_at(position + len(self._running))

    def _by_tenant(self, some: Iterable[Active]) -> Counter[str]:
        return Counter(label(self.model.config.serve, active.tenant) for active in some)

    def _note_end(self, active: Active, status: str) -> None:
        self.metrics.finished(status)
        self.metrics.tenant_finished(label(self.model.config.serve, active.tenant), status)

    def _ended(self, active: Active, task: asyncio.Task[None]) -> None:
        del self._running[active.video.id]
        active.stop_timer()
        if not task.cancelled():  # who stops it says so, when its traces are gone
            active.tell(ended=True)
        self._start_waiting()

    def _expire(self, active: Active) -> None:
        """The deadline has come: what waits never begins; what is being made is stopped."""
        if self._waiting.get(active.video.id) is active:
            self._waiting.remove(active.video.id)
            self._running[active.video.id] = active
            active.task = asyncio.create_task(self._fail(active, _LATE), context=contextvars.Context())
            active.task.add_done_callback(partial(self._ended, active))

    async def _make(self, active: Active) -> None:
        video = active.video
        REQUEST_ID.set(active.job.request_id)  # of the task alone: its lines are found by the id of the request
        begin = time.monotonic()
        try:
            left = None if active.deadline is None else active.deadline - time.time()
            about = {"job": video.id, "request_id": active.job.request_id}
            with span(video.object, active.job.traceparent, segments=active.segments, **about):
                async with asyncio.timeout(left):
                    await self._run(active)
        except TimeoutError:
            await self._fail(active, _LATE)
        except StageError as error:
            logger.exception("%s failed", video.id)
            await self._fail(active, _described(video, error), error.stage)
        except Exception:
            logger.exception("%s failed", video.id)
            message = "the video could not be made; see the server's log"
            await self._fail(active, VideoError(code="internal_error", message=message))
        else:
            self._mean_seconds = 0.7 * self._mean_seconds + 0.3 * (time.monotonic() - begin)
            await asyncio.to_thread(self._measure, active.job)
            await active.finish(None, self._expires_at())
            self._note_end(active, "completed")

    async def _run(self, active: Active) -> None:
        """Raises StageError; where the bundle that began it is gone, all is made again with the one that is served."""
        while True:
            config, files = self.model.config, self._files(active.job)
            orchestrator = Orchestrator(
                active.job, self._stages, files, active,
                config=config, planned_ahead=config.serve.planned_ahead,
            )  # fmt: skip
            active.partial = orchestrator.partial
            try:
                return await orchestrator.run()
            except StageError:
                if active.job.bundle == self.model.bundle or _goes_on(active) or await self._has_its_bundle(active):
                    raise
                await self._begin_again(active)

    def _measure(self, job: Job) -> None:
        try:
            self._store.measured(job.id, self._files(job).size())
        except (OSError, SQLAlchemyError):  # the cleaner measures it later
            logger.warning("%s: its files could not be measured", job.id, exc_info=True)

    async def _fail(self, active: Active, error: VideoError, stage: str = "") -> None:
        await active.finish(error, self._expires_at())
        keep = kept_segments(active.video, error) > 0
        # the picture that it starts from stays: the video may be remixed
        await asyncio.to_thread(without_error, partial(self._files(active.job).forget_all, keep))
        if keep:
            await asyncio.to_thread(self._measure, active.job)
        self.metrics.failure(error.code, stage)
        self._note_end(active, "failed")

    def _expires_at(self) -> int | None:
        return None if self._keep_s is None else int(time.time() + self._keep_s)

    @property
    def _keep_s(self) -> float | None:
        hours = self.model.config.serve.keep_hours
        return None if hours is None else 3600 * hours

    async def _clean(self) -> None:
        """Remove what nobody needs any more, now and then."""
        cleaner = Cleaner(self._store, self._places)
        while True:
            try:
                await asyncio.to_thread(cleaner.clean, self._keep_s)
            except Exception:
                logger.exception("what nobody needs any more could not be removed")
            await asyncio.sleep(_CLEANING_S)

    async def _watch(self) -> None:
        """Work on jobs only as long as nobody else may."""
        while await self._is_owner():
            await asyncio.sleep(_LOOK_S)
        logger.error("all work is stopped: %s", self.lost)
        await self._stop_all()

    async def _is_owner(self) -> bool:
        """Whether the jobs are this process's at this moment. If not, they never are again."""
        if not self._owner.may_be_lost:
            return True
        asked = asyncio.get_running_loop().run_in_executor(self._asking, self._owner.check)
        await asyncio.wait({asked}, timeout=_ANSWER_S)
        try:
            if asked.done():
                asked.result()
            else:
                self.lost = self.lost or f"the database has not said for {_ANSWER_S:g} s whose its jobs are"
                asked.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # told already
        except OwnerError as error:
            self.lost = self.lost or str(error)
        return not self.lost

    def refuse_if_lost(self) -> None:
        """Raises RequestError (503) where the jobs may be another process's."""
        if self.lost:
            message = "this process makes no videos any more, and another one takes its place: try again"
            raise RequestError(message, code="unavailable", status=503, retry_after_s=5)

    async def close(self) -> None:
        """Stop all work. What is unfinished goes on when the service starts again."""
        if self._watching:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self._stop_all()
        released = asyncio.get_running_loop().run_in_executor(self._asking, self._owner.release)
        await asyncio.wait({released}, timeout=_ANSWER_S)  # a server that does not answer holds nobody up
        self._store.close()

    async def _stop_all(self) -> None:
        all_active = [*self._waiting, *self._running.values()]
        self._waiting = FairQueue(self.model.config.serve.tenant)
        tasks = {task for task in (self._cleaning, *(active.task for active in all_active)) if task}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for active in all_active:
            active.tell(ended=True)

    async def _whole(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it to its end, whether or not the client that asked is still there: half would be worse than none.

        Raises RequestError as `refuse_if_lost` does.
        """
        try:
            self.refuse_if_lost()
        except RequestError:
            work.close()
            raise
        task = asyncio.create_task(work)
        self._at_work.add(task)
        task.add_done_callback(self._done_with)
        return await asyncio.shield(task)

    def _done_with(self, task: asyncio.Task[Any]) -> None:
        self._at_work.discard(task)
        if not task.cancelled():
            task.exception()  # who asked may be gone, and nobody else wants to know


def _described(video: Video, error: StageError) -> VideoError:
    """Why it failed, and what is kept of it."""
    found = VideoError(code=error.code, message=str(error))
    if count := kept_segments(video, found):
        where = f"/v1/{video.object}s/{video.id}/stream"
        found.message += f"; {count} of {len(video.segments)} segments are kept: GET {where}"
    return found


def _goes_on(active: Active) -> bool:
    """Whether it starts from something that its own bundle has made."""
    return bool(active.video.draft_id or active.video.extended_from_video_id or active.job.anew)


def _is_fresh(active: Active) -> bool:
    """Whether it has not begun, and starts from nothing that a bundle has made."""
    return active.video.started_at is None and not _goes_on(active)
