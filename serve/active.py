"""A video or draft that waits or is being made: its state, what has happened to it, and who watches it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy.exc import SQLAlchemyError

from serve.job_store import UNFINISHED, Event, JobStore, state_of
from serve.metrics import Metrics, Stage
from serve.schema import SegmentStatus, Video, VideoError
from serve.work import Job, Timed

logger = getLogger("ray.serve")

#: Share of the progress, in percent, that a segment in this state has made.
_PROGRESS: dict[SegmentStatus, int] = {"queued": 0, "planned": 10, "rendering": 10, "rendered": 90, "completed": 100}
_PIECE = 2**16  # bytes of a stream that are sent at once
_TOGETHER_S = 0.25  # for which a state that changes waits for the next one: both are written at once
_QUIET_S = 15.0  # without an event, after which a comment keeps the connection open
_GATHER_S = 0.1  # for which whoever has been told something is not told more: a message takes milliseconds of a core


class Change:
    """Wakes all who wait for something to change."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    @property
    def next(self) -> asyncio.Event:
        """Set by the next change. Whoever takes it before looking misses none."""
        return self._next

    def tell(self) -> None:
        """There is a change."""
        self._next.set()
        self._next = asyncio.Event()


@dataclass(eq=False)
class Active:
    """What is known of it while this process has it. Is told by its orchestrator (a `Watcher`)."""

    video: Video
    job: Job
    tenant: str  # whose it is
    store: JobStore
    metrics: Metrics
    deadline: float | None = None  # Unix seconds
    began: float = 0.0  # Unix seconds
    partial: Path | None = None  # the file that grows
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None  # of its deadline
    past: list[Event] = field(default_factory=list)  # lasting events
    fleeting: Event | None = None  # the newest of the others
    before_fleeting: int = 0  # lasting events that were there already
    changed: Change = field(default_factory=Change)  # of anything
    grown: Change = field(default_factory=Change)  # of the file, or the end
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _saved: int = 0  # events that the store has
    _saving: asyncio.Lock = field(default_factory=asyncio.Lock)
    _pending: asyncio.Task[None] | None = None  # a save that has not yet looked at the video
    _later: asyncio.TimerHandle | None = None  # begins one
    _saved_job: Job | None = None  # that the store has

    @property
    def id(self) -> str:
        """Of the video or draft."""
        return self.video.id

    @property
    def tellable(self) -> int:
        """How many lasting events may be told: the end only when it is written, for who hears it asks for the file."""
        return len(self.past) - (not self.ended and self.video.status not in UNFINISHED)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self._over.is_set()

    @property
    def segments(self) -> int:
        """How long it is."""
        return len(self.job.prompts)

    def restored(self, past: list[Event]) -> None:
        """Go on behind what the store has."""
        self.past, self._saved = past, len(past)

    async def save(self) -> None:
        """Write the state, how it is made, and the new events."""
        # one after the other, or an older state might be written last
        async with self._saving:
            self._pending = None
            if self._later is not None:
                self._later.cancel()
                self._later = None
            # as it is now, for the video changes meanwhile
            new, state, job = self.past[self._saved :], state_of(self.video), self.job
            changed = job if job is not self._saved_job else None
            await asyncio.to_thread(self.store.save, state, new, changed, self.deadline)
            self._saved, self._saved_job = self._saved + len(new), job

    def save_soon(self) -> None:
        """Write the state without keeping the work waiting; changes that come together are written together."""
        if self._pending is None:
            self._pending = asyncio.create_task(self._try_to_save())

    def save_later(self) -> None:
        """The same for what a restart can do without: in a moment, with what comes meanwhile."""
        if self._pending is None and self._later is None:
            self._later = asyncio.get_running_loop().call_later(_TOGETHER_S, self.save_soon)

    async def _try_to_save(self) -> None:
        try:
            await self.save()
        except SQLAlchemyError as error:  # what is not written now is written with what comes next
            logger.warning("%s: the database took no state: %s", self.video.id, type(error).__name__)

    async def _save_at_last(self) -> None:
        """Write the end, however long the database is away."""
        for again in itertools.count():
            try:
                return await self.save()
            except SQLAlchemyError:
                logger.exception("%s has ended, but the database took no state: once more", self.video.id)
                await asyncio.sleep(0.5 * 2 ** min(again, 6))

    def stop_timer(self) -> None:
        """The deadline does not matter any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def tell(self, kind: str | None = None, *, lasting: bool = True, ended: bool = False, **data: Any) -> None:
        """Note an event, and wake all who wait for a change."""
        if kind and lasting:
            self.past.append(Event(kind, data, len(self.past) + 1))
        elif kind and not self.ended:  # a replica's last words may come late
            self.fleeting, self.before_fleeting = Event(kind, data), len(self.past)
        if ended:
            self._over.set()
            self.grown.tell()
        self.changed.tell()

    async def gather(self) -> None:
        """Wait a moment for what else may happen; not behind the end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), _GATHER_S)

    def queued_at(self, position: int) -> None:
        """So many are made before it."""
        event = Event("queue", {"position": position})
        if self.fleeting != event:
            self.tell("queue", lasting=False, position=position)

    async def started(self, done: int) -> None:
        """See `Watcher`."""
        if self.video.status == "queued":
            self.video.status = "in_progress"
            self.tell("in_progress")
        if self.video.started_at is None:
            self.began = time.time()
            self.video.started_at = int(self.began)
        for segment in self.video.segments[:done]:
            segment.status = "completed"
        self.grown.tell()
        self.save_soon()

    async def segment(
        self, index: int, status: SegmentStatus, stage: Stage | None = None, times: Timed | None = None
    ) -> None:
        """See `Watcher`."""
        segment = self.video.segments[index]
        segment.status = status
        if stage and times:
            self.metrics.segment(stage, times.seconds)
            timing = self.video.timings[index]
            setattr(timing, f"{stage}_start_s", round(times.started - self.began, 3))
            setattr(timing, f"{stage}_s", round(times.seconds, 3))
        # 100 is for a file that can be fetched
        self._progress()
        if status == "completed":
            if index == 0:
                self.metrics.first_segment(time.time() - self.video.created_at)
            self.tell("segment.completed", index=index, frames=segment.frames, progress=self.video.progress)
            self.grown.tell()
        elif status in ("planned", "rendered"):
            self.tell(f"segment.{status}", index=index)
        else:
            self.tell()
        if status == "completed":
            self.save_soon()
        else:
            self.save_later()

    async def step(self, index: int, step: int) -> None:
        """See `Watcher`."""
        steps = self.job.options.evaluations
        if self.video.segments[index].status == "rendering":
            self._progress(80 * (step - 1) / steps)
        self.tell("segment.step", lasting=False, index=index, step=step, steps=steps)

    def _progress(self, more: float = 0.0) -> None:
        done = sum(_PROGRESS[segment.status] for segment in self.video.segments) + more
        self.video.progress = max(self.video.progress, min(99, int(done / len(self.video.segments))))

    async def finish(self, error: VideoError | None, expires_at: int | None) -> None:
        """It is completed, or has failed. Whoever waits is woken when that is written."""
        self.video.status = "failed" if error else "completed"
        self.video.error, self.video.expires_at = error, expires_at
        self.video.completed_at = int(time.time())
        self.video.progress = self.video.progress if error else 100
        self.past.append(Event(self.video.status, error.model_dump() if error else {}, len(self.past) + 1))
        await self._save_at_last()


async def pieces(file: BinaryIO, active: Active | None) -> AsyncIterator[bytes]:
    """A file to its end: as it is, or, while it is being made, as it grows."""
    try:  # what is open can be read to its end, whoever renames or removes it
        while True:
            grown, ended = (active.grown.next, active.ended) if active else (None, True)
            while piece := await asyncio.to_thread(file.read, _PIECE):
                yield piece
            if ended or grown is None:
                return
            await grown.wait()
    finally:
        await asyncio.to_thread(file.close)  # a client that is gone may have left a read behind


async def told(active: Active, after: int) -> AsyncIterator[Event | None]:
    """Events as they come, the lasting ones behind number `after` first; None where nothing came for a while."""
    fleeting: Event | None = None
    while True:
        changed, ended, tellable = active.changed.next, active.ended, active.tellable
        new = active.past[after:tellable]
        if active.fleeting is not None and active.fleeting is not fleeting:
            fleeting = active.fleeting
            new.insert(max(0, active.before_fleeting - after), fleeting)
        after = max(after, tellable)
        for event in new:
            yield event
        if ended:
            return
        if new:
            await active.gather()
            continue
        try:
            await asyncio.wait_for(changed.wait(), _QUIET_S)
        except TimeoutError:
            yield None


def as_text(event: Event | None) -> str:
    """An event as `text/event-stream` has it; None: a comment."""
    if event is None:
        return ": \n\n"
    number = "" if event.number is None else f"id: {event.number}\n"
    return f"{number}event: {event.type}\ndata: {json.dumps(event.data)}\n\n"
