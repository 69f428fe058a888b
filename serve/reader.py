"""What can be seen of videos and drafts, finished or not. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from itertools import chain, takewhile

from serve import pictures
from serve.active import Active, pieces, told
from serve.blobs import Opened
from serve.callers import LOCAL, Caller
from serve.job_files import JobFiles
from serve.job_store import Event, JobStore, Stored
from serve.places import Places
from serve.schema import STORAGE_FULL, DraftTokens, RequestError, SegmentPlan, Video, VideoError
from serve.work import Job


class VideoReader(ABC):
    """Reads what the store and the files have, and what this process knows of a video that is being made."""

    def __init__(self, store: JobStore, places: Places) -> None:
        self._store, self._places = store, places

    @abstractmethod
    def _find(self, video_id: str) -> Active | None:
        """The video, if this process has it under way."""

    async def get(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> Video:
        """Raises RequestError (404)."""
        return (await self.stored(video_id, caller, kind)).video

    async def page(
        self, kind: str, caller: Caller, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Video], bool]:
        """Videos in the order they were accepted, and whether there are more. Raises RequestError for `after`."""
        try:
            return await asyncio.to_thread(
                self._store.page, kind, caller, after=after, limit=limit, newest_first=newest_first
            )
        except KeyError:
            raise RequestError(f"no {kind} {after!r}", param="after", code="not_found") from None

    async def tokens(self, draft_id: str, caller: Caller = LOCAL) -> DraftTokens:
        """The plan of a draft, as far as it is there. Raises RequestError (404)."""
        files = self._files((await self.stored(draft_id, caller, "draft")).job)
        found = await asyncio.to_thread(lambda: list(files.segments()))
        known = [(index, record.tokens) for index, record in found if record.tokens is not None]
        return DraftTokens(
            segments=[SegmentPlan(index=i, shape=list(t.shape), tokens=t.flatten().tolist()) for i, t in known]
        )

    async def content(
        self, video_id: str, caller: Caller = LOCAL, kind: str = "video", variant: pictures.Variant = "video"
    ) -> Opened:
        """The mp4 or a PNG, open: whoever removes it from now on, it can be read (in a bucket it cannot).

        Raises RequestError: unknown (404), not finished or failed (409).
        """
        before = await self._finished(video_id, caller, kind)
        files, name = self._files(before.job), pictures.FILES[variant]
        try:
            if variant != "video":
                await asyncio.to_thread(pictures.draw, files, variant)
                await self._check_drawn(before, caller, kind, files, name)
            return await asyncio.to_thread(files.open, name)
        except FileNotFoundError:
            await self._finished(video_id, caller, kind)  # says what it is now
            raise unknown(video_id, kind) from None

    async def _check_drawn(self, before: Stored, caller: Caller, kind: str, files: JobFiles, name: str) -> None:
        """Raises RequestError if the video was deleted or made anew while its picture was drawn: then that goes too."""
        now = await asyncio.to_thread(self._store.get, before.video.id, caller)
        if now is None:
            await asyncio.to_thread(files.delete)
            raise unknown(before.video.id, kind)
        if now.video.completed_at != before.video.completed_at or now.job != before.job:
            await asyncio.to_thread(files.remove, name)
            await self._finished(before.video.id, caller, kind)  # says what it is now
            raise RequestError("it was made anew meanwhile: ask again", code=f"{kind}_queued", status=409)

    async def stream(self, video_id: str, caller: Caller = LOCAL, kind: str = "video") -> AsyncIterator[bytes]:
        """The video as it is made: a fragmented mp4, segment by segment; the file of one that is finished.

        Ends where the making ends, if it fails or is stopped; of one that failed: the segments that are kept.
        Raises RequestError: unknown (404), failed and nothing is kept (409).
        """
        stored = await self.stored(video_id, caller, kind)
        if active := self._find(video_id):
            return self._growing(active)
        return await self._at_rest(stored)

    async def events(
        self, video_id: str, after: int, caller: Caller = LOCAL, kind: str = "video"
    ) -> AsyncIterator[Event | None]:
        """What happens to a video, as it happens; first the lasting events behind number `after`.

        None comes where nothing has happened for a while. Raises RequestError (404).
        """
        await self.stored(video_id, caller, kind)
        if active := self._find(video_id):
            return told(active, after)
        return _each(await asyncio.to_thread(self._store.events, video_id, after))

    def _files(self, job: Job) -> JobFiles:
        return JobFiles(self._places.of(job.tenant), job.id)

    async def stored(self, job_id: str, caller: Caller, kind: str) -> Stored:
        """The job, if the caller may see it. Raises RequestError (404)."""
        stored = await asyncio.to_thread(self._store.get, job_id, caller)
        if stored is None or stored.video.object != kind:
            raise unknown(job_id, kind)
        return stored

    async def _finished(self, job_id: str, caller: Caller, kind: str) -> Stored:
        stored = await self.stored(job_id, caller, kind)
        status = stored.video.status
        if status != "completed":
            message = f"the {kind} is {status}: it has no content" + ("" if status == "failed" else " yet")
            if (error := stored.video.error) and kept_segments(stored.video, error):
                message += f" ({error.message})"
            raise RequestError(message, param=f"{kind}_id", code=f"{kind}_{status}", status=409)
        return stored

    async def _at_rest(self, stored: Stored) -> AsyncIterator[bytes]:
        """What there is to see of a video that nobody works on. Raises RequestError."""
        video = stored.video
        if count := kept_segments(video, video.error):
            parts = self._files(stored.job).kept(count)
            with suppress(FileNotFoundError):
                if first := await asyncio.to_thread(next, parts, b""):
                    return _read(chain([first], parts))
        return pieces((await self.content(video.id, kind=video.object)).file, None)

    async def _growing(self, active: Active) -> AsyncIterator[bytes]:
        """The file of a video that is being made, as soon as there is one, or what there is of one that has ended."""
        found: AsyncIterator[bytes] | None = None
        while found is None:
            changed, ended = active.changed.next, active.ended
            with suppress(FileNotFoundError):
                if active.partial:
                    found = pieces(active.partial.open("rb"), active)
            if found is None and ended:
                try:
                    found = await self._at_rest(await self.stored(active.id, LOCAL, active.video.object))
                except RequestError:
                    return
            if found is None:
                await changed.wait()
        async for piece in found:
            yield piece


async def _each(events: list[Event]) -> AsyncIterator[Event | None]:
    for event in events:
        yield event


async def _read(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    while part := await asyncio.to_thread(next, parts, b""):
        yield part


def kept_segments(video: Video, error: VideoError | None) -> int:
    """How many segments are kept of a video that ends with `error`: those that were finished when the disk was full."""
    if error is None or error.code != STORAGE_FULL:
        return 0
    return sum(1 for _ in takewhile(lambda segment: segment.status == "completed", video.segments))


def unknown(job_id: str, kind: str) -> RequestError:
    """There is no such video, or none that the caller may see."""
    return RequestError(f"no {kind} {job_id[:64]!r}", param=f"{kind}_id", code="not_found", status=404)
