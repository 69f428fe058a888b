"""A stored file as an answer: all of it, or the ranges of it that were asked for (RFC 9110, section 14)."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Mapping
from email.utils import formatdate
from typing import BinaryIO

from fastapi.responses import Response, StreamingResponse

from serve.blobs import Opened
from serve.schema import RequestError

Span = tuple[int, int]  # the first byte, and the one behind the last

_PIECE = 2**16  # bytes that are sent at once
_MOST_SPANS = 100  # who asks for more gets all of the file
_SPAN = re.compile(r"\s*(\d{0,18})\s*-\s*(\d{0,18})\s*", re.ASCII)


def file_answer(
    opened: Opened, asked: Mapping[str, str], media_type: str, filename: str, *, headers_only: bool = False
) -> Response:
    """The file, which is closed behind it; or its headers alone. `asked` are the headers of the request.

    Raises RequestError for a Range that is none (400), or that the file does not have (416).
    """
    size, mark = opened.size, f"{opened.modified}-{opened.size}".encode()
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private",  # with a pass no header tells a proxy that it is for one client alone
        "content-disposition": f'attachment; filename="{filename}"',
        "last-modified": formatdate(opened.modified, usegmt=True),
        "etag": f'"{hashlib.md5(mark, usedforsecurity=False).hexdigest()}"',
    }
    if headers_only:  # whatever range is asked for
        opened.file.close()
        return Response(headers=headers | {"content-length": str(size)}, media_type=media_type)
    wanted = asked.get("range")
    if asked.get("if-range", headers["etag"]) not in (headers["etag"], headers["last-modified"]):
        wanted = None  # the client has a part of another file
    try:
        spans = _spans(wanted, size) if wanted is not None else []
    except RequestError:
        opened.file.close()
        raise
    parts, tail = [(b"", span) for span in spans or [(0, size)]], b""
    if len(spans) == 1:
        headers["content-range"] = _content_range(spans[0], size)
    elif spans:
        boundary = secrets.token_hex(13)
        head = f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: "
        parts = [(f"{head}{_content_range(span, size)}\r\n\r\n".encode(), span) for span in spans]
        media_type, tail = f"multipart/byteranges; boundary={boundary}", f"\r\n--{boundary}--".encode()
    headers["content-length"] = str(sum(len(head) + end - start for head, (start, end) in parts) + len(tail))
    body = _body(opened.file, parts, tail)
    return StreamingResponse(body, 206 if spans else 200, headers=headers, media_type=media_type)


def _content_range(span: Span, size: int) -> str:
    return f"bytes {span[0]}-{span[1] - 1}/{size}"


def _spans(wanted: str, size: int) -> list[Span]:
    """What a Range asks for, in order, without overlaps; nothing: all of the file. Raises RequestError."""
    unit, _, listed = wanted.partition("=")
    if listed and unit.strip().lower() != "bytes":
        return []
    if listed.count(",") >= _MOST_SPANS:
        return []
    spans = []
    for found in map(_SPAN.fullmatch, listed.split(",")):
        if found and (found[1] or found[2]):
            start = int(found[1]) if found[1] else max(0, size - int(found[2]))
            spans.append((start, min(size, int(found[2]) + 1) if found[1] and found[2] else size))
    if not spans:
        raise _malformed(wanted)
    spans = [(start, end) for start, end in spans if start < size]
    if not spans:
        raise RequestError(
            f"the file has {size} bytes: {wanted[:64]!r} asks for others",
            param="Range",
            code="range_not_satisfiable",
            status=416,
            headers={"Content-Range": f"bytes */{size}"},
        )
    if any(start >= end for start, end in spans):
        raise _malformed(wanted)
    spans.sort()
    joined = [spans[0]]
    for start, end in spans[1:]:
        if start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _malformed(wanted: str) -> RequestError:
    message = f"{wanted[:64]!r} is no range: expected bytes=FIRST-LAST, bytes=FIRST- or bytes=-LENGTH"
    return RequestError(message, param="Range", code="invalid_range", status=400)


async def _body(file: BinaryIO, parts: list[tuple[bytes, Span]], tail: bytes) -> AsyncIterator[bytes]:
    try:
        for head, (at, end) in parts:
            if head:
                yield head
            await asyncio.to_thread(file.seek, at)
            while at < end:
                piece = await asyncio.to_thread(file.read, min(_PIECE, end - at))
                if not piece:
                    raise EOFError(f"the file ends at byte {at}, it had more")
                at += len(piece)
                yield piece
        if tail:
            yield tail
    finally:
        await asyncio.to_thread(file.close)  # a client that is gone may have left a read behind
