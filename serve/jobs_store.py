"""The record of all videos in SQL: it outlives the process that makes them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import JSON, Engine, String, create_engine, delete, event, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from serve.schema import Video, VideoError, VideoRequest

INTERRUPTED = VideoError(code="server_restarted", message="the server was restarted before the video was finished")


class _Base(DeclarativeBase):
    pass


class _Row(_Base):
    __tablename__ = "videos"

    #: Counts up, so that videos made within one second have an order.
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True, index=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    video: Mapped[dict] = mapped_column(JSON)
    request: Mapped[dict] = mapped_column(JSON)


class JobStore:
    """Videos by id. Methods block (milliseconds): call them from a thread where an event loop must stay live."""

    def __init__(self, url: str) -> None:
        """`url` is SQLAlchemy's; `JobStore.in_folder` makes that of the default, a SQLite file."""
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _tune_sqlite)
        _Base.metadata.create_all(self._engine)

    @classmethod
    def in_folder(cls, folder: Path) -> JobStore:
        """The store in `folder`, which is created if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        return cls(f"sqlite:///{folder / 'videos.sqlite'}")

    @property
    def engine(self) -> Engine:
        """The database behind the store."""
        return self._engine

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def add(self, video: Video, request: VideoRequest) -> None:
        """Record a new video and what was asked for."""
        with Session(self._engine) as session, session.begin():
            session.add(
                _Row(
                    id=video.id,
                    status=video.status,
                    video=video.model_dump(mode="json"),
                    request=request.model_dump(mode="json"),
                )
            )

    def save(self, video: Video) -> None:
        """Write the state of a video. One that has been deleted stays deleted."""
        with Session(self._engine) as session, session.begin():
            session.execute(
                update(_Row).where(_Row.id == video.id).values(status=video.status, video=video.model_dump(mode="json"))
            )

    def get(self, video_id: str) -> Video | None:
        """The video, or None."""
        with Session(self._engine) as session:
            row = session.scalar(select(_Row).where(_Row.id == video_id))
            return Video.model_validate(row.video) if row else None

    def page(self, *, after: str | None = None, limit: int = 20, newest_first: bool = True) -> tuple[list[Video], bool]:
        """Up to `limit` videos that follow video `after`, and whether there are more. Raises KeyError for `after`."""
        order = _Row.number.desc() if newest_first else _Row.number.asc()
        query = select(_Row.video).order_by(order).limit(limit + 1)
        with Session(self._engine) as session:
            if after is not None:
                number = session.scalar(select(_Row.number).where(_Row.id == after))
                if number is None:
                    raise KeyError(after)
                query = query.where(_Row.number < number if newest_first else _Row.number > number)
            found = [Video.model_validate(video) for video in session.scalars(query)]
        return found[:limit], len(found) > limit

    def delete(self, video_id: str) -> bool:
        """Forget a video; False if there was none."""
        with Session(self._engine) as session, session.begin():
            return bool(session.execute(delete(_Row).where(_Row.id == video_id)).rowcount)  # type: ignore[attr-defined]

    def fail_unfinished(self, error: VideoError = INTERRUPTED) -> list[str]:
        """Mark every video that is neither completed nor failed as failed; returns their ids."""
        with Session(self._engine) as session, session.begin():
            rows = session.scalars(select(_Row).where(_Row.status.in_(("queued", "in_progress")))).all()
            for row in rows:
                video = Video.model_validate(row.video).model_copy(update={"status": "failed", "error": error})
                row.status, row.video = video.status, video.model_dump(mode="json")
            return [row.id for row in rows]


def _tune_sqlite(connection, _record) -> None:
    """Readers do not wait for the writer, and a writer waits for another one instead of failing."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=10000")
    connection.execute("PRAGMA synchronous=NORMAL")
