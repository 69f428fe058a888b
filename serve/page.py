"""The web page at `/`: files of `serve/web`, as they are. It uses the API as every other client does.

What it may load, and from where, `guard.py` says: nothing inline, and nothing from elsewhere.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).with_name("web")

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # kept by the browser, but asked for each time: mostly answered by 304
    "Vary": "Accept-Encoding",
}


def mount_page(app: FastAPI) -> None:
    """Add `/` and `/web/NAME`. The files are read once, now: they are few and small."""
    files = {path.name: path.read_bytes() for path in WEB.iterdir() if path.suffix in _TYPES}
    packed = {name: gzip.compress(data, mtime=0) for name, data in files.items()}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in files.items()}

    def answer(request: Request, name: str) -> Response:
        headers = {**_HEADERS, "ETag": tags[name]}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if tags[name] in known or "*" in known:
            return Response(status_code=304, headers=headers)
        body = files[name]
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = packed[name], "gzip"
        return Response(body, media_type=_TYPES[Path(name).suffix], headers=headers)

    async def page(request: Request) -> Response:
        return answer(request, "index.html")

    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return answer(request, name)

    # no part of the API: not in its description
    app.add_api_route("/", page, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/web/{name}", file, methods=["GET", "HEAD"], include_in_schema=False)
