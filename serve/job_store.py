"""The record of all videos and drafts in SQL: it outlives the process that makes them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Connection,
    Engine,
    Select,
    String,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from serve.callers import Caller
from serve.database import create_tables
from serve.rows import UNREADABLE, files_of, job_of, strange, video_of
from serve.schema import Video
from serve.work import JOB, Job

logger = getLogger("ray.serve")

UNFINISHED = ("queued", "in_progress")
_AT_ONCE = 500  # values in one query
DAY_S = 86_400

#: libpq's: seconds until a server that is gone without a word is noticed; by default a quarter of an hour.
_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": 15_000,
}
#: Columns of a job's row, by name: what `state_of` gives and `JobStore.save` writes.
State = dict[str, Any]


class Base(DeclarativeBase):
    """Of all tables of the service."""


class _Row(Base):
    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("owner", "idempotency_key"),)

    #: Counts up, so that videos made within one second have an order.
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True, index=True)
    kind: Mapped[str] = mapped_column(String(8), index=True)
    #: The tenant that it belongs to.
    owner: Mapped[str] = mapped_column(String(256), index=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    video: Mapped[dict] = mapped_column(JSON)
    job: Mapped[dict] = mapped_column(JSON)
    deadline: Mapped[float | None]
    expires_at: Mapped[int | None] = mapped_column(index=True)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_digest: Mapped[str] = mapped_column(String(64))
    #: Of its files, once it is finished; None: nobody has looked yet.
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)


class _RequestRow(Base):
    """A request that changed a job that there was already; the one that made it is in the job's own row."""

    __tablename__ = "requests"

    owner: Mapped[str] = mapped_column(String(256), primary_key=True)
    idempotency_key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(String(64), index=True)


class _UsageRow(Base):
    __tablename__ = "usage"

    owner: Mapped[str] = mapped_column(String(256), primary_key=True)
    day: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # since 1970, UTC
    segments: Mapped[int]  # accepted


class _EventRow(Base):
    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict] = mapped_column(JSON)


class _IdentityRow(Base):
    __tablename__ = "identity"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # there is one row
    name: Mapped[str] = mapped_column(String(32))


class DayUsedError(Exception):
    """The owner's day has no room for so many segments more."""


@dataclass(frozen=True)
class Event:
    """What happened to a video; lasting ones are numbered from 1."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    number: int | None = None


@dataclass
class Stored:
    """A job as the store has it. `deadline` is in Unix seconds."""

    video: Video
    job: Job
    owner: str
    deadline: float | None = None
    idempotency_key: str | None = None
    request_digest: str = ""


@dataclass(frozen=True)
class RequestKey:
    """Whose request it was, its Idempotency-Key, and the digest of all that it says."""

    owner: str
    idempotency_key: str
    digest: str


class JobStore:
    """Videos and drafts by id. Methods block (milliseconds): call them from a thread where an event loop stays live."""

    def __init__(self, url: str) -> None:
        """`url` is SQLAlchemy's; `JobStore.in_folder` makes that of the default, a SQLite file."""
        address = make_url(url)
        sqlite = address.get_backend_name() == "sqlite"
        patience = _PATIENCE if address.get_driver_name() in ("psycopg", "psycopg2") else {}
        self._engine = create_engine(url, pool_pre_ping=not sqlite, connect_args=patience)  # a file does not hang up
        if sqlite:
            event.listen(self._engine, "connect", _tune_sqlite)
        create_tables(self._engine, Base.metadata)

    @classmethod
    def opened(cls, url: str | None, folder: Path) -> JobStore:
        """The database at `url`; without one, the store in `folder`."""
        return cls(url) if url else cls.in_folder(folder)

    @classmethod
    def in_folder(cls, folder: Path) -> JobStore:
        """The store in `folder`, which is created if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(f"sqlite:///{folder / 'jobs.sqlite'}")

    @property
    def engine(self) -> Engine:
        """The database behind the store."""
        return self._engine

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def add(self, new: Stored, segments: int = 0, per_day: int | None = None) -> Stored | None:
        """Record a new job. If its owner has used its idempotency key already: the job that there is, instead.

        `segments` are counted to the owner's day. Raises DayUsedError if these would be more than `per_day`.
        """
        row = _Row(
            kind=new.video.object,
            owner=new.owner,
            deadline=new.deadline,
            idempotency_key=new.idempotency_key,
            request_digest=new.request_digest,
            **state_of(new.video),
            job=JOB.dump_python(new.job, mode="json"),
        )
        try:
            day = self._open_day(new.owner)
            with Session(self._engine) as session, session.begin():
                session.add(row)
                session.flush()
                _use(session, new.owner, day, segments, per_day)
        except IntegrityError:
            earlier = self.find(new.owner, new.idempotency_key)
            if earlier is None:
                raise
            return earlier
        return None

    def change(
        self,
        changed: Stored,
        event: Event,
        segments: int = 0,
        per_day: int | None = None,
        request: RequestKey | None = None,
    ) -> bool:
        """Record that a finished job is made again, and what has happened to it. False if it is not there any more.

        `segments` are counted, and DayUsedError is raised, as `add` does.
        """
        day = self._open_day(changed.owner)
        with Session(self._engine) as session, session.begin():
            state = state_of(changed.video)
            if not _write(session.connection(), state, [event], changed.job, changed.deadline):
                return False
            _use(session, changed.owner, day, segments, per_day)
            if request is not None:
                # in place of what may be there of a job that is gone
                session.merge(
                    _RequestRow(
                        owner=request.owner,
                        idempotency_key=request.idempotency_key,
                        request_digest=request.digest,
                        job_id=changed.job.id,
                    )
                )
        return True

    def used(self, owner: str) -> tuple[int, int]:
        """Segments that an owner has had accepted today (UTC), and bytes of all that it keeps."""
        with Session(self._engine) as session:
            row = session.get(_UsageRow, (owner, _today()))
            stored = select(func.sum(_Row.stored_bytes)).where(_Row.owner == owner)
            return row.segments if row else 0, int(session.scalar(stored) or 0)

    def measured(self, job_id: str, stored_bytes: int) -> None:
        """So long are the files of a job."""
        with Session(self._engine) as session, session.begin():
            session.execute(update(_Row).where(_Row.id == job_id).values(stored_bytes=stored_bytes))

    def unmeasured(self) -> list[Job]:
        """Some finished jobs whose files nobody has measured: those of an earlier version."""
        query = select(_Row).where(_Row.status == "completed", _Row.stored_bytes.is_(None)).limit(_AT_ONCE)
        with Session(self._engine) as session:
            return [_stored(row).job for row in session.scalars(query)]

    def _open_day(self, owner: str) -> int:
        """Make the row that today's segments are counted in: the day."""
        key = (owner, _today())
        try:
            with Session(self._engine) as session, session.begin():
                if session.get(_UsageRow, key) is None:
                    session.add(_UsageRow(owner=owner, day=key[1], segments=0))
        except IntegrityError:  # another request made it just now
            pass
        return key[1]

    def find(self, owner: str, idempotency_key: str | None) -> Stored | None:
        """The job that an owner asked for, or had changed, with this key; its digest is that of this request."""
        if idempotency_key is None:
            return None
        made = select(_Row).where(_Row.owner == owner, _Row.idempotency_key == idempotency_key)
        changed = select(_Row, _RequestRow.request_digest).join(_RequestRow, _RequestRow.job_id == _Row.id)
        asked = (_RequestRow.owner == owner) & (_RequestRow.idempotency_key == idempotency_key)
        with Session(self._engine) as session:
            if row := session.scalar(made):
                return _stored(row)
            found = session.execute(changed.where(asked)).one_or_none()
            return replace(_stored(found[0]), request_digest=found[1]) if found else None

    def save(
        self, state: State, events: Sequence[Event] = (), job: Job | None = None, deadline: float | None = None
    ) -> None:
        """Write the state of a video, and what has happened to it; with `job`, also how it is made, and until when.

        One that has been deleted stays deleted. Events that are there already are not written again.
        """
        # without a session, which takes as long again: this is done for every segment
        with self._engine.begin() as connection:
            _write(connection, state, events, job, deadline)

    def get(self, job_id: str, caller: Caller) -> Stored | None:
        """The job, if the caller may see it."""
        with Session(self._engine) as session:
            row = session.scalar(_seen_by(caller, select(_Row)).where(_Row.id == job_id))
            return _stored(row) if row else None

    def page(
        self, kind: str, caller: Caller, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[list[Video], bool]:
        """Up to `limit` videos (or drafts) behind `after`, and whether there are more. Raises KeyError for `after`."""
        order = _Row.number.desc() if newest_first else _Row.number.asc()
        query = _seen_by(caller, select(_Row)).where(_Row.kind == kind).order_by(order).limit(limit + 1)
        with Session(self._engine) as session:
            if after is not None:
                number = session.scalar(_seen_by(caller, select(_Row.number)).where(_Row.id == after))
                if number is None:
                    raise KeyError(after)
                query = query.where(_Row.number < number if newest_first else _Row.number > number)
            found = [video_of(row.id, row.video) for row in session.scalars(query)]
        return found[:limit], len(found) > limit

    def events(self, job_id: str, after: int = 0) -> list[Event]:
        """The lasting events behind number `after`, in order."""
        query = select(_EventRow).where(_EventRow.job_id == job_id, _EventRow.number > after).order_by(_EventRow.number)
        with Session(self._engine) as session:
            return [Event(row.type, row.data, row.number) for row in session.scalars(query)]

    def delete(self, job_id: str, *, unfinished: bool = True) -> bool:
        """Forget a job, one that is not finished only if `unfinished`; False if there was none."""
        which = _Row.id == job_id
        with Session(self._engine) as session, session.begin():
            found = session.execute(delete(_Row).where(which if unfinished else which & _Row.status.not_in(UNFINISHED)))
            if not found.rowcount:  # type: ignore[attr-defined]
                return False
            for table in (_EventRow, _RequestRow):
                session.execute(delete(table).where(table.job_id == job_id))
        return True

    def unfinished(self) -> list[Stored]:
        """What an earlier process has accepted and not finished, in the order it was accepted.

        What cannot be read (other code has written it) has failed.
        """
        with Session(self._engine) as session, session.begin():
            rows = session.scalars(select(_Row).where(_Row.status.in_(UNFINISHED)).order_by(_Row.number))
            found = [(row, _stored(row)) for row in rows]
            return [stored for row, stored in found if _can_go_on(session, row, stored)]

    def known(self, ids: Sequence[str]) -> set[str]:
        """Which of these jobs there are."""
        with Session(self._engine) as session:
            some = (ids[first : first + _AT_ONCE] for first in range(0, len(ids), _AT_ONCE))
            return {each for part in some for each in session.scalars(select(_Row.id).where(_Row.id.in_(part)))}

    def identity(self) -> str:
        """A name that no other database has."""
        try:
            with Session(self._engine) as session, session.begin():
                if session.get(_IdentityRow, 1) is None:
                    session.add(_IdentityRow(number=1, name=uuid.uuid4().hex))
        except IntegrityError:  # another process gave it one just now
            pass
        with Session(self._engine) as session:
            return session.get_one(_IdentityRow, 1).name

    def expired(self, now: float | None = None) -> list[Job]:
        """What may be removed."""
        with Session(self._engine) as session:
            past = _Row.expires_at <= (time.time() if now is None else now)
            rows = session.scalars(select(_Row).where(past, _Row.status.not_in(UNFINISHED)))
            return [_stored(row).job for row in rows]

    def expire(self, keep_s: float) -> None:
        """What is finished and has no time to expire at gets one: so many seconds behind its end."""
        endless = _Row.expires_at.is_(None) & _Row.status.not_in(UNFINISHED)
        with Session(self._engine) as session, session.begin():
            for row in session.scalars(select(_Row).where(endless)):
                video = video_of(row.id, row.video)
                row.expires_at = int((video.completed_at or video.created_at) + keep_s)
                row.video = {**row.video, "expires_at": row.expires_at}


def state_of(video: Video) -> State:
    """The state of a video as it is now, as `JobStore.save` takes it."""
    shown = video.model_dump(mode="json")
    return {"id": video.id, "status": video.status, "video": shown, "expires_at": video.expires_at}


def _stored(row: _Row) -> Stored:
    video, job = video_of(row.id, row.video), job_of(row.job)
    if job is None:
        video.status, video.error, job = "failed", UNREADABLE, files_of(row.id, row.job)
    return Stored(video, job, row.owner, row.deadline, row.idempotency_key, row.request_digest)


def _can_go_on(session: Session, row: _Row, stored: Stored) -> bool:
    """Whether the row could be read; where not, it has failed, and says so."""
    if stored.video.error != UNREADABLE:
        if names := strange(row.job):
            logger.warning("%s: options that this code does not know are left out: %s", row.id, ", ".join(names))
        return True
    logger.error("%s: its row cannot be read: it has failed", row.id)
    stored.video.completed_at = int(time.time())
    row.status, row.video = "failed", stored.video.model_dump(mode="json")
    last = session.scalar(select(func.max(_EventRow.number)).where(_EventRow.job_id == row.id)) or 0
    session.add(_EventRow(job_id=row.id, number=last + 1, type="failed", data=UNREADABLE.model_dump()))
    return False


def _seen_by(caller: Caller, query: Select[Any]) -> Select[Any]:
    return query if caller.role == "admin" else query.where(_Row.owner == caller.owner)


def _today() -> int:
    return int(time.time() // DAY_S)


def _write(
    connection: Connection, state: State, events: Sequence[Event], job: Job | None, deadline: float | None
) -> bool:
    """See `JobStore.save`. False if there is no such job."""
    values = dict(state)
    video_id = values.pop("id")
    if job is not None:
        values |= {"job": JOB.dump_python(job, mode="json"), "deadline": deadline}
    found = connection.execute(update(_Row).where(_Row.id == video_id).values(**values))
    if not found.rowcount:
        return False
    if events:
        # the connection may have broken behind a commit that nobody heard of
        there = connection.scalar(select(func.max(_EventRow.number)).where(_EventRow.job_id == video_id)) or 0
        new = [
            {"job_id": video_id, "number": each.number, "type": each.type, "data": each.data}
            for each in events
            if each.number is not None and each.number > there
        ]
        if new:
            connection.execute(insert(_EventRow), new)
    return True


def _use(session: Session, owner: str, day: int, segments: int, per_day: int | None) -> None:
    # one statement: two requests at the same time cannot both take what is left
    counted_in = (_UsageRow.owner == owner) & (_UsageRow.day == day)
    room = counted_in if per_day is None else counted_in & (_UsageRow.segments + segments <= per_day)
    counted = session.execute(update(_UsageRow).where(room).values(segments=_UsageRow.segments + segments))
    if not counted.rowcount:  # type: ignore[attr-defined]
        raise DayUsedError(owner)


def _tune_sqlite(connection, _record) -> None:
    """Readers do not wait for the writer, and a writer waits for another one instead of failing."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=10000")
