"""Who makes the jobs of a database: one process. Two would make every waiting video twice, into the same files.

With SQLite it has locked a file beside the database, with PostgreSQL a connection of its own holds an advisory lock.
Kernel and server free these as soon as the process is dead. Who only reads the database, or keeps its keys, needs none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from logging import getLogger
from pathlib import Path

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError

logger = getLogger("ray.serve")

#: For the end of an earlier process: longer than Serve gives a replica, and than PostgreSQL takes to miss a dead node.
WAIT_S = 30.0
_AGAIN_S = 0.2
#: In seconds; by default a server waits two hours for a client whose machine is gone.
_KEEPALIVE = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "2"}


class OwnerError(Exception):
    """Another process makes the jobs of this database, or may do so."""


class Owner(ABC):
    """The right to make the jobs of a database. Methods block: call all of them from one thread."""

    #: Whether it can end while this process lives: then `check` it, again and again.
    may_be_lost = False

    def __init__(self, place: str) -> None:
        self._place = place
        self._held = False

    def take(self) -> None:
        """Wait up to `WAIT_S` for it. Raises OwnerError, which says who has it."""
        if self._held:
            return
        deadline, told = time.monotonic() + WAIT_S, False
        try:
            while (holder := self._try()) is not None:
                if time.monotonic() > deadline:
                    raise OwnerError(
                        f"{self._place}: its videos are made by {holder or 'another process'}, and one service makes "
                        "them: end that one first, or name another --output (args.data) or serve.database_url"
                    )
                if not told:
                    logger.warning("%s: waiting up to %g s for the end of %s", self._place, WAIT_S, holder)
                    told = True
                time.sleep(_AGAIN_S)
        except BaseException:
            self.release()
            raise
        self._held = True

    def check(self) -> None:
        """Raises OwnerError if it was lost or released."""
        if not self._held:
            raise OwnerError(f"{self._place}: its videos are not made by this process any more")

    def release(self) -> None:
        """The next one need not wait."""
        self._held = False
        self._let_go()

    @abstractmethod
    def _try(self) -> str | None:
        """Take it; who has it, if that cannot be (empty: unknown)."""

    @abstractmethod
    def _let_go(self) -> None:
        """Also where nothing is held."""


def owner_of(engine: Engine) -> Owner:
    """Of the jobs of a database. Raises OwnerError for one that is neither SQLite nor PostgreSQL."""
    backend = engine.url.get_backend_name()
    if backend == "sqlite":
        with engine.connect() as connection:
            return _FileOwner(connection.scalar(text("SELECT file FROM pragma_database_list WHERE name = 'main'")))
    if backend == "postgresql":
        return _SessionOwner(engine)
    raise OwnerError(f"serve.database_url: {backend}: expected sqlite or postgresql")


@contextmanager
def owning(engine: Engine) -> Iterator[None]:
    """Within the block no other process makes the jobs of a database. Raises OwnerError."""
    owner = owner_of(engine)
    owner.take()
    try:
        yield
    finally:
        owner.release()


class _FileOwner(Owner):
    """Beside an SQLite file; one in memory is nobody else's."""

    def __init__(self, database: str | None) -> None:
        super().__init__(database or "memory")
        self._path = Path(f"{database}.owner") if database else None
        self._file: TextIOWrapper | None = None

    def _try(self) -> str | None:
        if self._path is None:
            return None
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if isinstance(error, BlockingIOError):
                    file.seek(0)
                    return file.read().strip()
            raise OwnerError(f"{self._path}: cannot be locked ({error.strerror}): set serve.database_url") from None
        file.truncate(0)
        file.write(_me() + "\n")
        file.flush()
        self._file = file  # locked as long as it is open; never removed, or two could lock two files of one name
        return None

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _SessionOwner(Owner):
    """A lock that a connection to PostgreSQL holds; a pooler must not share that with others."""

    may_be_lost = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(f"database {engine.url.database}")
        self._engine = engine
        self._connection: Connection | None = None
        self._backend = self._key = 0

    def _try(self) -> str | None:
        connection = self._connection or self._connect()
        if connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}):
            return None
        held = "locktype = 'advisory' AND granted AND objsubid = 1 AND classid::bigint = :high AND objid::bigint = :low"
        database = "(SELECT oid FROM pg_database WHERE datname = current_database())"
        holders = connection.scalars(
            text(
                f"SELECT application_name FROM pg_stat_activity JOIN pg_locks USING (pid) "
                f"WHERE {held} AND database = {database}"
            ),
            {"high": self._key >> 32 & 0xFFFFFFFF, "low": self._key & 0xFFFFFFFF},
        )
        return holders.first() or ""

    def _connect(self) -> Connection:
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # from the store's pool
        self._connection = connection
        for name, value in {"application_name": _me()[:63], **_KEEPALIVE}.items():
            connection.execute(text("SELECT set_config(:name, :value, false)"), {"name": name, "value": value})
        # databases of one server have locks of their own, schemas have not
        schema = "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = 'jobs'::regclass"
        digest = hashlib.sha256(f"arlon-ray jobs of {connection.scalar(text(schema))}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._backend = connection.scalar(text("SELECT pg_backend_pid()"))
        return connection

    def check(self) -> None:
        super().check()
        assert self._connection is not None
        try:
            backend = self._connection.scalar(text("SELECT pg_backend_pid()"))
        except SQLAlchemyError as error:
            self.release()
            raise OwnerError(
                f"{self._place}: the connection that held the lock on its jobs is lost ({type(error).__name__}): "
                "another process may make its videos now"
            ) from error
        if backend != self._backend:
            self.release()
            raise OwnerError(
                f"{self._place}: the connection that held the lock on its jobs is another's now: a pooler between must "
                "not share connections (session pooling)"
            )

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):  # it may be broken
                connection.close()


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
