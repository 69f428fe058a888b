"""The web page at `/`, files of `serve/web` as they are, and at `/docs` the description of the API (Swagger UI).

Both use the API as every other client does. What they may load, and from where, `guard.py` says: nothing inline, and
nothing from elsewhere. Swagger UI's own files are those of the package `fastapi-offline`, so that it works without
internet, and nobody else's script comes near the key that the page keeps in its tab.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

WEB = Path(__file__).with_name("web")
#: Of those in the package; the others are not needed.
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # kept by the browser, but asked for each time: mostly answered by 304
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class _File:
    """A file as it is sent."""

    name: str
    data: bytes

    @cached_property
    def packed(self) -> bytes:
        return gzip.compress(self.data, mtime=0)

    @cached_property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.tag}
        known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        if self.tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        body = self.data
        if "gzip" in request.headers.get("accept-encoding", ""):
            body, headers["Content-Encoding"] = self.packed, "gzip"
        return Response(body, media_type=_TYPES[Path(self.name).suffix], headers=headers)


def mount_page(app: FastAPI) -> None:
    """Add `/` and `/web/NAME`, `/docs` and `/docs/NAME`. The files are read once, now: they are few."""
    ours = {path.name: _File(path.name, path.read_bytes()) for path in WEB.iterdir() if path.suffix in _TYPES}
    package = resources.files("fastapi_offline") / "static"
    theirs = {name: _File(name, (package / name).read_bytes()) for name in SWAGGER_UI}
    _add(app, "/", ours["index.html"])
    _add(app, "/docs", ours["docs.html"])
    _add_folder(app, "/web", ours)
    _add_folder(app, "/docs", theirs)


# no part of the API: not in its description
def _add(app: FastAPI, path: str, file: _File) -> None:
    async def page(request: Request) -> Response:
        return file.answer(request)

    app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)


def _add_folder(app: FastAPI, path: str, files: dict[str, _File]) -> None:
    async def one(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return files[name].answer(request)

    app.add_api_route(f"{path}/{{name}}", one, methods=["GET", "HEAD"], include_in_schema=False)
