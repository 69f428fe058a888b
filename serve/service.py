"""Admission: what clients ask for, checked, written down and put into the queue. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from serve import new_jobs
from serve.callers import LOCAL, Caller
from serve.cleaning import without_error
from serve.job_files import JobFiles, SegmentRecord
from serve.job_store import DayUsedError, Event, RequestKey, Stored
from serve.making import OTHER_MODEL, VideoMaker
from serve.quotas import most_queued, queue_refusal, retry_after
from serve.reader import unknown
from serve.schema import (
    ExtendRequest,
    PlanRequest,
    Quota,
    RemixRequest,
    RequestError,
    RerollRequest,
    Usage,
    Video,
    VideoRequest,
)
from serve.tracing import traceparent
from serve.work import Frame, Job


class VideoService(VideoMaker):
    """Makes videos and drafts that clients ask for."""

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
        is the same video. Raises RequestError: a bad field (400), a key that was used otherwise (409), too many (429).
        """
        digest = _digest(request, b"" if picture is None else picture.tobytes())
        asked = _Asked(caller, request_id, idempotency_key, digest, _deadline(request))
        if isinstance(request, VideoRequest) and request.draft is not None:
            if picture is not None:
                raise RequestError("the draft says that already", param="input_reference")
            return await self._whole(self._render_draft(request, asked))

        async def new() -> Video:
            if earlier := await self._asked_before(asked):
                return earlier
            made = new_jobs.asked(request, self.model.config, self.model.count_tokens)
            return await self._accept(made, asked, lambda files: files.write_picture(picture))

        return await self._whole(new())

    async def _render_draft(self, request: VideoRequest, asked: _Asked) -> Video:
        assert request.draft is not None
        if earlier := await self._asked_before(asked):
            return earlier
        async with self._rerolling:  # it must not change while it is taken over
            source = self._check_bundle(await self._finished(request.draft, asked.caller, "draft"))
            new = new_jobs.rendered(source, request, self.model.config, self.model.count_tokens)
            return await self._accept(new, asked, partial(self._take_over, source))

    def _take_over(self, source: Stored, files: JobFiles) -> None:
        """A draft's plan, and the picture it starts from. Raises RequestError (404) if it is gone."""
        draft, taken = self._files(source.job), 0
        for index, record in draft.segments():
            if record.tokens is not None:
                files.write_segment(index, SegmentRecord(record.tokens))
                taken += 1
        if taken != len(source.job.prompts):
            raise unknown(source.job.id, "draft")
        files.write_picture(draft.picture())

    async def remix(
        self,
        video_id: str,
        request: RemixRequest,
        caller: Caller = LOCAL,
        request_id: str = "",
        idempotency_key: str | None = None,
    ) -> Video:
        """Accept the same video with another text. The key is that of `create`. Raises RequestError."""
        digest = _digest(request, f"remix {video_id}".encode())
        return await self._whole(self._remix(video_id, request, _Asked(caller, request_id, idempotency_key, digest)))

    async def _remix(self, video_id: str, request: RemixRequest, asked: _Asked) -> Video:
        if earlier := await self._asked_before(asked):
            return earlier
        stored = await self.stored(video_id, asked.caller, "video")
        new = new_jobs.remixed(stored, request, self.model.config, self.model.count_tokens)
        return await self._accept(new, asked, lambda files: files.write_picture(self._files(stored.job).picture()))

    async def extend(
        self,
        request: ExtendRequest,
        caller: Caller = LOCAL,
        request_id: str = "",
        idempotency_key: str | None = None,
    ) -> Video:
        """Accept a finished video with more behind it. The key is that of `create`. Raises RequestError."""
        digest = _digest(request, b"extend")
        return await self._whole(self._extend(request, _Asked(caller, request_id, idempotency_key, digest)))

    async def _extend(self, request: ExtendRequest, asked: _Asked) -> Video:
        if earlier := await self._asked_before(asked):
            return earlier
        stored = self._check_bundle(await self._finished(request.video.id, asked.caller, "video"))
        new = new_jobs.extended(stored, request, self.model.config, self.model.count_tokens)

        def prepare(files: JobFiles) -> None:
            try:
                files.go_on_from(self._files(stored.job))
            except FileNotFoundError:  # deleted meanwhile
                raise unknown(stored.video.id, "video") from None

        return await self._accept(new, asked, prepare)

    async def reroll(
        self,
        draft_id: str,
        index: int,
        request: RerollRequest,
        caller: Caller = LOCAL,
        idempotency_key: str | None = None,
        request_id: str = "",
    ) -> Video:
        """Plan a segment of a draft anew; with a key that was used for the same before, the draft as it is now.

        Raises RequestError; 409 while the draft is being made.
        """
        digest = _digest(request, f"reroll {draft_id} {index}".encode())
        asked = _Asked(caller, request_id, idempotency_key, digest)
        return await self._whole(self._reroll(draft_id, index, request, asked))

    async def _reroll(self, draft_id: str, index: int, request: RerollRequest, asked: _Asked) -> Video:
        async with self._rerolling:  # or two would find it finished
            if earlier := await self._asked_before(asked):
                return earlier
            stored = self._check_bundle(await self._finished(draft_id, asked.caller, "draft"))
            video, job = new_jobs.rerolled(stored, index, request, self.model.config, self.model.count_tokens)
            await self._quotas.check_stored(stored.owner)
            self._refuse_if_full(stored.owner)
            job = replace(job, request_id=asked.request_id, traceparent=traceparent())
            again = replace(stored, video=video, job=job, deadline=None)
            past = await asyncio.to_thread(self._store.events, draft_id)
            past.append(Event("segment.reset", {"index": index}, len(past) + 1))
            if not await self._is_owner():  # asked before it is written: it cannot be taken back from who is
                self.refuse_if_lost()
            await self._change(again, past[-1], asked)
            active = self._active(again)
            active.restored(past)
            accepted = video.model_copy(deep=True)
            self._enqueue(active)
            return accepted

    async def _change(self, again: Stored, event: Event, asked: _Asked) -> None:
        """Write down that it is made again. Raises RequestError."""
        segments, per_day = _to_make(again.video), self._quotas.per_day(again.owner)
        request = RequestKey(asked.caller.owner, asked.key, asked.digest) if asked.key else None
        try:
            there = await asyncio.to_thread(self._store.change, again, event, segments, per_day, request)
        except DayUsedError:
            raise self._quotas.day_used(again.owner, segments) from None
        if not there:  # it has expired meanwhile
            raise unknown(again.video.id, "draft")

    def _check_bundle(self, stored: Stored) -> Stored:
        """Raises RequestError for what another bundle has made, which this one cannot go on from."""
        if stored.job.bundle != self.model.bundle:
            raise RequestError(OTHER_MODEL.message, code=OTHER_MODEL.code, status=409)
        return stored

    async def _asked_before(self, asked: _Asked) -> Video | None:
        """What the same caller asked for with the same key. Raises RequestError (409) if that was something else."""
        if asked.key is None:
            return None
        earlier = await asyncio.to_thread(self._store.find, asked.caller.owner, asked.key)
        return _same(earlier, asked) if earlier else None

    async def _accept(self, new: new_jobs.New, asked: _Asked, prepare: Callable[[JobFiles], None]) -> Video:
        """Write the job down, with what it starts from, and let it wait for its turn."""
        owner, place = asked.caller.owner, self._places.tenant(asked.caller)
        await self._quotas.check_stored(owner)
        self._refuse_if_full(owner)
        video, job = new
        job = replace(job, request_id=asked.request_id, traceparent=traceparent(), tenant=place)
        any_bundle = not job.bundle  # else it goes on from what that has made
        if any_bundle:
            job = replace(job, bundle=self.model.bundle, bundle_path=self.model.path)
        video.bundle = job.bundle[:12] or None
        kept = Stored(video, job, owner, asked.deadline, asked.key, asked.digest)
        files, accepted, segments = self._files(job), video.model_copy(deep=True), _to_make(video)
        self._arriving[owner] += 1
        try:
            await asyncio.to_thread(prepare, files)
            earlier = await asyncio.to_thread(self._store.add, kept, segments, self._quotas.per_day(owner))
        except Exception as error:
            await asyncio.to_thread(without_error, files.delete)
            if isinstance(error, DayUsedError):
                raise self._quotas.day_used(owner, segments) from None
            raise
        finally:
            self._arriving[owner] -= 1
        if earlier:
            await asyncio.to_thread(without_error, files.delete)
            return _same(earlier, asked)
        if not await self._is_owner():  # who is, may have looked for what is unfinished before this was written down
            await asyncio.to_thread(self._take_back, job)
            self.refuse_if_lost()
        active = self._active(kept)
        if any_bundle and active.job.bundle != self.model.bundle:  # exchanged while it was written down
            self._label(active)
            active.save_soon()
        self._enqueue(active)
        return accepted

    def _take_back(self, job: Job) -> None:
        with suppress(SQLAlchemyError):  # where it cannot be deleted, whoever comes next makes it
            self._store.delete(job.id)
            without_error(self._files(job).delete)

    async def usage(self, caller: Caller = LOCAL) -> Usage:
        """What the caller's tenant has, and may have."""
        owner, settings = caller.owner, self.model.config.serve
        quota = settings.tenant(owner)
        segments, stored = await asyncio.to_thread(self._store.used, owner)
        return Usage(
            tenant=owner,
            queued=Quota(used=self._waiting.of(owner) + self._arriving[owner], most=most_queued(settings, owner)[1]),
            running=Quota(used=self._running_of(owner), most=quota.max_running),
            segments_today=Quota(used=segments, most=quota.segments_per_day),
            stored_bytes=Quota(used=stored, most=quota.max_stored_bytes),
        )

    def _running_of(self, owner: str) -> int:
        return sum(each.tenant == owner for each in self._running.values())

    def _refuse_if_full(self, owner: str) -> None:
        settings, waiting = self.model.config.serve, len(self._waiting) + self._arriving.total()
        own = self._waiting.of(owner) + self._arriving[owner]
        refusal = queue_refusal(settings, owner, waiting, own, len(self._running), self._running_of(owner))
        if refusal:
            retry_after_s = retry_after(settings, self._mean_seconds)
            raise self._quotas.refusal(owner, refusal.message, refusal.code, retry_after_s=retry_after_s)


@dataclass(frozen=True)
class _Asked:
    """Who asked, and how: `key` is the Idempotency-Key, `digest` that of the request, `deadline` in Unix seconds."""

    caller: Caller
    request_id: str = ""
    key: str | None = None
    digest: str = ""
    deadline: float | None = None


def _same(earlier: Stored, asked: _Asked) -> Video:
    if earlier.request_digest != asked.digest:
        message = "this Idempotency-Key was used for another request"
        raise RequestError(message, param="Idempotency-Key", code="idempotency_conflict", status=409)
    return earlier.video


def _digest(request: BaseModel, *rest: bytes) -> str:
    """Of all that a request says: its body, and what else there is."""
    return hashlib.sha256(b"".join([request.model_dump_json().encode(), *rest])).hexdigest()


def _to_make(video: Video) -> int:
    """Segments of a video that are not there yet."""
    return sum(segment.status != "completed" for segment in video.segments)


def _deadline(request: PlanRequest) -> float | None:
    return None if request.deadline_s is None else time.time() + request.deadline_s
