"""Bodies of requests: each read whole, before anybody works on it, all together within a bound of memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.datastructures import Headers
from starlette.types import Receive

from arlon_ray.config import ServeConfig
from serve.schema import RequestError

#: Of each body so much does not count: requests without pictures get in whatever others send.
FREE_BYTES = 2**16
_RETRY_AFTER_S = 2


class ClientGone(Exception):
    """The client closed the connection before its request was whole: there is nobody to answer."""


class Uploads:
    """Reads bodies. What has arrived counts, not what was announced: who sends nothing takes nobody's place."""

    def __init__(self, settings: ServeConfig) -> None:
        self._settings = settings
        self._held = 0

    @asynccontextmanager
    async def body(self, headers: Headers, receive: Receive) -> AsyncIterator[bytes]:
        """A whole body, which counts until the block ends.

        Raises RequestError: too long (413), too slow (408), too much of all clients at once (503); ClientGone.
        """
        body, whole = bytearray(), b""
        try:
            await self._read(headers, receive, body)
            whole = bytes(body)
            body.clear()  # held once, as it is counted
            yield whole
        finally:
            self._held -= _counted(len(body) + len(whole))

    async def _read(self, headers: Headers, receive: Receive, body: bytearray) -> None:
        patience_s = self._settings.body_timeout_s
        declared = headers.get("content-length", "")
        if declared.isdecimal():
            self._check(0, int(declared[:20]))  # sooner than when half of it is here
        try:
            async with asyncio.timeout(patience_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    self._held += self._check(len(body), len(body) + len(piece))
                    body += piece
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            text = f"the body did not arrive within {patience_s:g} s"
            raise RequestError(text, code="body_timeout", status=408) from None

    def _check(self, length: int, grown: int) -> int:
        """How much more counts when a body grows. Raises RequestError."""
        most = self._settings.max_upload_bytes
        if grown > most:
            raise RequestError(f"the body is longer than {most} bytes", code="body_too_large", status=413)
        more = _counted(grown) - _counted(length)
        if more and self._held + more > self._settings.upload_memory_bytes:
            message = f"too much is being uploaded at the moment: try again in {_RETRY_AFTER_S} s"
            raise RequestError(message, code="uploads_full", status=503, retry_after_s=_RETRY_AFTER_S)
        return more


def _counted(length: int) -> int:
    return max(0, length - FREE_BYTES)
