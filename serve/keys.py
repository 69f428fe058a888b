"""Bearer keys: who may use the service, and as whom. Only a key's hash is kept.

A key is `arlon_PREFIX_SECRET`. The prefix finds its row; the secret is 256 random bits, so that a plain hash of it is
as good as a slow one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from logging import getLogger

from sqlalchemy import Engine, String, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from arlon_ray.config import TENANT_PATTERN, ConfigError, ServeConfig
from serve.callers import Caller, Role
from serve.database import create_tables
from serve.passes import Passes

#: How long a revoked key may go on working, for a key that has been looked up is believed so long.
BELIEVED_S = 5.0
#: `last_used_at` is written no more often.
_USE_NOTED_S = 60.0
_MOST_BELIEVED = 10_000
_KEY = re.compile(r"arlon_([0-9a-f]{12})_[A-Za-z0-9_-]{43}", re.ASCII)

logger = getLogger(__name__)


class KeyNameError(ValueError):
    """A name that no key can be made for, or that has none. One line that says what to do."""


class _Base(DeclarativeBase):
    pass


class _Row(_Base):
    __tablename__ = "keys"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(64), index=True)
    role: Mapped[str] = mapped_column(String(8))
    prefix: Mapped[str] = mapped_column(String(12), unique=True, index=True)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int]
    last_used_at: Mapped[int | None]
    revoked_at: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    tenant: Mapped[str | None] = mapped_column(String(64))


@dataclass(frozen=True)
class Known:
    """A key that is good: whose it is, the limit of its own that it has, if any, and its prefix."""

    caller: Caller
    requests_per_minute: int | None = None
    prefix: str = field(default="", compare=False)


@dataclass(frozen=True)
class KeyInfo:
    """What may be shown of a key. Times are Unix seconds."""

    name: str
    role: Role
    prefix: str
    created_at: int
    last_used_at: int | None
    revoked_at: int | None
    requests_per_minute: int | None
    tenant: str = ""


class Keys:
    """The keys in a database, which may be the job store's. Methods block, and raise SQLAlchemyError without it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        create_tables(engine, _Base.metadata)

    def add(
        self,
        name: str,
        role: Role = "user",
        requests_per_minute: int | None = None,
        *,
        tenant: str = "",
        another: bool = False,
    ) -> str:
        """Make a key and return it: it can never be read again.

        A name has one key, or with `another` more of them, of one role and tenant: a new one can be handed out before
        the old one is revoked. A name whose keys are all revoked may be used again, and owns what it owned. Without
        `tenant` the name is a tenant of its own. Raises KeyNameError.
        """
        for what, given in (("name", name), *([("tenant", tenant)] if tenant else [])):
            if not re.fullmatch(TENANT_PATTERN, given, re.ASCII):
                expected = "expected up to 64 letters, digits and @._+-, a letter or digit first"
                raise KeyNameError(f"{what} {given!r}: {expected}")
        prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        key = f"arlon_{prefix}_{secret}"
        with Session(self._engine) as session, session.begin():
            works = _Row.revoked_at.is_(None)
            there = session.execute(select(_Row.role, _Row.tenant).where(_Row.name == name, works)).all()
            if there and not another:
                raise KeyNameError(f"{name} has a key: revoke it first, or ask for another one beside it")
            if {each.role for each in there} - {role}:
                raise KeyNameError(f"{name} is {there[0].role}: a name has one role; revoke its keys first")
            if {each.tenant or "" for each in there} - {tenant}:
                belongs = f"of the tenant {there[0].tenant or name}"
                raise KeyNameError(f"{name} is {belongs}: a name has one tenant; revoke its keys first")
            if not tenant and session.scalar(select(_Row.number).where(_Row.tenant == name).limit(1)) is not None:
                raise KeyNameError(f"{name} is a tenant's name: name the tenant {name} too, or choose another name")
            if tenant and tenant != name:
                alone = (_Row.name == tenant) & _Row.tenant.is_(None)  # revoked or not: what it owned stays its own
                if session.scalar(select(_Row.number).where(alone).limit(1)) is not None:
                    raise KeyNameError(f"{tenant} is a name that is a tenant of its own: choose another tenant")
            session.add(
                _Row(
                    name=name, role=role, prefix=prefix, sha256=_hash(key), created_at=int(time.time()),
                    requests_per_minute=requests_per_minute, tenant=tenant or None,
                )
            )  # fmt: skip
        return key

    def find(self, key: str) -> Known | None:
        """Whose key it is; None for one that is unknown or revoked."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        with Session(self._engine) as session:
            row = session.scalar(select(_Row).where(_Row.prefix == match[1]))
        # compared also where there is nothing to find, so that time tells nothing of prefixes
        good = hmac.compare_digest(_hash(key), row.sha256 if row else "0" * 64)
        if row is None or not good or row.revoked_at is not None:
            return None
        if time.time() - (row.last_used_at or 0) > _USE_NOTED_S:
            self._note_use(row.number)
        return _known(row)

    def with_prefix(self, prefix: str) -> Known | None:
        """Whose key that is, for who has shown by something else that it may use it; None where it is revoked."""
        with Session(self._engine) as session:
            row = session.scalar(select(_Row).where(_Row.prefix == prefix, _Row.revoked_at.is_(None)))
        return _known(row) if row else None

    def _note_use(self, number: int) -> None:
        try:
            with Session(self._engine) as session, session.begin():
                session.execute(update(_Row).where(_Row.number == number).values(last_used_at=int(time.time())))
        except SQLAlchemyError:  # a database that is busy is no reason to refuse anybody
            logger.warning("the use of a key could not be noted", exc_info=True)

    def list(self) -> list[KeyInfo]:
        """All keys, the oldest first."""
        with Session(self._engine) as session:
            return [
                KeyInfo(
                    row.name, "admin" if row.role == "admin" else "user", row.prefix, row.created_at,
                    row.last_used_at, row.revoked_at, row.requests_per_minute, row.tenant or "",
                )
                for row in session.scalars(select(_Row).order_by(_Row.number))
            ]  # fmt: skip

    def revoke(self, name: str) -> int:
        """Revoke all keys of a name, or the one with that prefix; returns how many. Raises KeyNameError for none."""
        good = _Row.revoked_at.is_(None) & ((_Row.name == name) | (_Row.prefix == name))
        with Session(self._engine) as session, session.begin():
            rows = session.scalars(select(_Row).where(good)).all()
            for row in rows:
                row.revoked_at = int(time.time())
            if not rows:
                raise KeyNameError(f"{name} has no key that works")
            return len(rows)

    def any(self) -> bool:
        """Whether there is a key that works."""
        with Session(self._engine) as session:
            return session.scalar(select(_Row.number).where(_Row.revoked_at.is_(None)).limit(1)) is not None


class KeyCheck:
    """Looks keys up for an event loop, and believes what it found for `BELIEVED_S`."""

    def __init__(self, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys, self._clock = keys, clock
        self._believed: dict[str, tuple[float, Known]] = {}
        self._passes = Passes()
        # a thread of its own: a flood of wrong keys does not keep the others of the process waiting
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keys")

    async def __call__(self, key: str) -> Known | None:
        """See `Keys.find`."""
        # a hash of bytes that the client chose: no bytes of a key are kept
        return await self._look_up(_hash(key), self._keys.find, key)

    async def by_pass(self, given: str) -> Known | None:
        """Whose key a pass was made with; None for a pass that is none or over, and with a key that is revoked."""
        prefix = self._passes.prefix(given)
        return await self._look_up(prefix, self._keys.with_prefix, prefix) if prefix else None

    def make_pass(self, prefix: str) -> str:
        """See `Passes.make`."""
        return self._passes.make(prefix)

    async def _look_up(self, name: str, find: Callable[[str], Known | None], what: str) -> Known | None:
        until, known = self._believed.get(name, (0.0, None))
        if known is not None and self._clock() < until:
            return known
        known = await asyncio.get_running_loop().run_in_executor(self._thread, find, what)
        if known is None:
            self._believed.pop(name, None)
        else:
            if len(self._believed) >= _MOST_BELIEVED:
                self._believed.clear()
            self._believed[name] = (self._clock() + BELIEVED_S, known)
        return known


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there. A name other than localhost might be anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_auth(settings: ServeConfig) -> bool:
    """Whether keys are needed. Raises ConfigError if they are switched off for a host that others can reach."""
    if settings.auth == "auto":
        return not is_loopback(settings.host)
    if settings.auth == "off" and not is_loopback(settings.host):
        raise ConfigError(
            f"serve.auth=off, but serve.host={settings.host} lets other machines in: leave serve.auth=auto and make "
            "keys with `python jobs/keys.py add NAME`, or set serve.host=127.0.0.1"
        )
    return settings.auth == "on"


def open_keys(settings: ServeConfig, engine: Engine) -> KeyCheck | None:
    """The keys of the service, or None where none are needed. Says in the log how to make one if there is none.

    Raises ConfigError as `check_auth` does.
    """
    if not check_auth(settings):
        return None
    keys = Keys(engine)
    if not keys.any():
        place = f"--database '{engine.url.render_as_string(hide_password=True)}'"
        logger.warning("no key can use the service yet: make one with `python jobs/keys.py add NAME %s`", place)
    return KeyCheck(keys)


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in a request's headers; None if there is none, or more than one."""
    found = [value for name, value in headers if name.lower() == b"authorization"]
    if len(found) != 1:
        return None
    scheme, _, key = found[0].decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _known(row: _Row) -> Known:
    role: Role = "admin" if row.role == "admin" else "user"
    return Known(Caller(row.name, role, row.tenant or ""), row.requests_per_minute, row.prefix)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
