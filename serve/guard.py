"""What stands before every route: request id, keys, limits, and errors that give nothing away."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import DEBUG, INFO, getLogger
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arlon_ray.config import ServeConfig
from serve.callers import LOCAL, Caller
from serve.keys import KeyCheck, Known, bearer
from serve.local import check_local
from serve.logs import REQUEST_ID
from serve.metrics import Metrics
from serve.passes import pass_in
from serve.schema import RequestError, error_body
from serve.uploads import ClientGone, Uploads

#: What anybody may see: the page, the API's description, and whether the service lives. All else needs a key.
OPEN_PATHS = frozenset({"/", "/healthz", "/docs", "/openapi.json", "/favicon.ico"})
OPEN_FOLDERS = ("/web/", "/docs/")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFE_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
#: In logs and metrics, of a client that went away before it was answered.
_CLIENT_GONE = 499

logger = getLogger(__name__)
access = getLogger("serve.access")


class Guard:
    """ASGI middleware. Sets scope["state"]: `caller` (a Caller), `key` (its prefix) and `request_id`.

    The application sees a request only once its key is known, its limit allows it, and its whole body is there.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServeConfig,
        keys: KeyCheck | None = None,
        metrics: Metrics | None = None,
        *,
        echo_request_id: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `keys` everybody on this machine, and nobody else, is `LOCAL`.

        `echo_request_id`: whether answers get the X-Request-ID; behind Ray Serve's proxy, which adds it itself, not.
        """
        self._app, self._settings, self._keys = app, settings, keys
        self._metrics = metrics or Metrics()
        self._echo = echo_request_id
        self._limit = RateLimit(settings.requests_per_minute, clock)
        self._open = OpenRequests(settings.max_open_per_key)
        self._uploads = Uploads(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no WebSockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _GIVEN_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        answer = _Answer(send, request_id if self._echo else None)
        began, token = time.perf_counter(), REQUEST_ID.set(request_id)
        try:
            await self._serve(scope, receive, answer, headers)
        finally:
            self._note(scope, answer.status or _CLIENT_GONE, time.perf_counter() - began)
            REQUEST_ID.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, answer: _Answer, headers: Headers) -> None:
        try:
            await self._admit(scope, headers)
            # what ends work is let through
            counted = self._keys is not None and scope["method"] != "DELETE"
            with self._open.one(scope["state"].get("caller") if counted else None):
                if scope["method"] in _WITH_BODY:
                    async with self._uploads.body(headers, receive) as body:
                        await self._app(scope, replayed(body, receive), answer.send)
                else:
                    await self._app(scope, receive, answer.send)
        except RequestError as error:
            await answer.refuse(error)
        except ClientGone:
            pass
        except Exception:
            logger.exception("a request failed")
            if answer.status is not None:
                raise  # half an answer is out: the server breaks the connection, so that nobody takes it for whole
            await answer.refuse(RequestError("internal error", code="internal_error", status=500))

    async def _admit(self, scope: Scope, headers: Headers) -> None:
        """Say in the scope who calls. Raises RequestError."""
        path = _path(scope)
        if "\0" in path or b"%00" in scope.get("query_string", b""):  # PostgreSQL takes none
            raise RequestError("the address has a zero character", code="invalid_address", status=400)
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
        if self._keys is None:
            if path != "/healthz":
                check_local(scope, headers, self._settings)
            scope["state"]["caller"] = LOCAL
        elif not is_open:
            known = await self._known(scope, headers)
            scope["state"]["caller"], scope["state"]["key"] = known.caller, known.prefix
            self._limit.take(known.caller.name, known.requests_per_minute)

    async def _known(self, scope: Scope, headers: Headers) -> Known:
        assert self._keys is not None
        key = bearer(headers.raw)
        given = pass_in(scope["method"], _path(scope), scope.get("query_string", b""))
        if key is None and given is None:
            message = "a key is needed: send the header Authorization: Bearer YOUR_KEY"
            raise RequestError(message, code="missing_api_key", status=401)
        try:
            known = await (self._keys.by_pass(given or "") if key is None else self._keys(key))
        except SQLAlchemyError:
            logger.exception("a key cannot be looked up")
            message = "keys cannot be checked at the moment"
            raise RequestError(message, code="unavailable", status=503, retry_after_s=5) from None
        if known is None and key is None:
            raise RequestError("the pass is over, or of a key that is", code="invalid_pass", status=401)
        if known is None:
            raise RequestError("the key is unknown or has been revoked", code="invalid_api_key", status=401)
        return known

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        route, caller = _route(scope), scope["state"].get("caller")
        name = caller.name if caller else "-"
        self._metrics.request(method, route, status, seconds)
        # clients poll: lines of reading that went well would bury the others
        level = DEBUG if method in ("GET", "HEAD") and status < 400 else INFO
        access.log(
            level, "%s %s %d %.3f s %s", method, route, status, seconds, name,
            extra={
                "method": method, "route": route, "status": status, "seconds": round(seconds, 6), "caller": name,
            },
        )  # fmt: skip


class RateLimit:
    """A bucket for each name, that fills up with its requests per minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, per_minute: int | None = None) -> None:
        """Count a request. Raises RequestError (429) that says when the next one may come."""
        full, now = float(per_minute or self._per_minute), self._clock()
        left, at = self._buckets.get(name, (full, now))
        left = min(full, left + (now - at) * full / 60)
        if left < 1:
            wait_s = math.ceil((1 - left) * 60 / full)
            self._buckets[name] = left, now
            raise RequestError(
                f"more than {full:g} requests a minute: try again in {wait_s} s",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=wait_s,
            )
        self._buckets[name] = left - 1, now


class OpenRequests:
    """Requests that are being answered: events and streams last as long as a video is made."""

    def __init__(self, most: int) -> None:
        """`most`: of one key."""
        self._most, self._open = most, Counter[str]()

    @contextmanager
    def one(self, caller: Caller | None) -> Iterator[None]:
        """One more within the block; nobody counts those without a key. Raises RequestError (429)."""
        if caller is None:
            yield
            return
        if self._open[caller.name] >= self._most:
            raise RequestError(
                f"{self._most} requests of this key are open already (max_open_per_key): close some",
                code="too_many_open",
                status=429,
                retry_after_s=1,
            )
        self._open[caller.name] += 1
        try:
            yield
        finally:
            self._open[caller.name] -= 1
            self._open += Counter()  # names with none are forgotten


class _Answer:
    """Sends an answer on, with the headers that all have, and knows whether it has begun."""

    def __init__(self, send: Send, request_id: str | None) -> None:
        self._send, self._request_id = send, request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in _SAFE_HEADERS.items():
                headers.setdefault(name, value)
            if self._request_id is not None:
                headers["x-request-id"] = self._request_id
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error, in OpenAI's form."""
        content = error_body(error.status, error.message, param=error.param, code=error.code)
        body = json.dumps(content).encode()
        headers: dict[str, Any] = {"content-type": "application/json", "content-length": str(len(body))}
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if error.status == 401:
            headers["www-authenticate"] = 'Bearer realm="arlon"'
        if error.status in (408, 413, 503):
            headers["connection"] = "close"  # what is left of the body is not read
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, and then what the server says of the client."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _path(scope: Scope) -> str:
    """The path as routes are matched: without the prefix that the application is mounted at."""
    path, root = scope["path"], scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _route(scope: Scope) -> str:
    """The template of the route, of which there are only so many."""
    if (path := getattr(scope.get("route"), "path", None)) is not None:
        return str(path)
    path = _path(scope)
    folder = next((folder for folder in OPEN_FOLDERS if path.startswith(folder)), None)
    return path if path in OPEN_PATHS else folder or "unmatched"
