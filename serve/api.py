"""HTTP: the OpenAI Videos API over a `VideoService`, and what goes beyond it."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from arlon_ray import __version__
from arlon_ray.config import Config
from serve.active import as_text
from serve.bodies import EXTEND_BODY, VIDEO_BODY, first_frame, json_only, read_extend_request, read_video_request
from serve.callers import Caller
from serve.errors import answer_errors
from serve.exchange import Exchange
from serve.guard import OPEN_PATHS, Guard
from serve.keys import KeyCheck
from serve.page import mount_page
from serve.passes import PASS_S
from serve.pictures import FILES, Variant
from serve.schema import (
    DraftTokens,
    ErrorAnswer,
    ExtendRequest,
    Model,
    ModelList,
    Pass,
    PlanRequest,
    RemixRequest,
    RequestError,
    RerollRequest,
    Usage,
    Video,
    VideoDeleted,
    VideoList,
    VideoRequest,
)
from serve.sending import file_answer
from serve.service import VideoService
from serve.tracing import trace_of

#: How often a client should ask, in milliseconds (the OpenAI client heeds it).
_POLL = {"openai-poll-after-ms": "500"}
_AT_ONCE = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies too send what comes at once


T = TypeVar("T")
_stopping: set[asyncio.Task[None]] = set()  # or they could be collected while they run


def _caller(request: Request) -> Caller:
    return request.state.caller


def _request_id(request: Request) -> str:
    return request.state.request_id


def _last_event(last_event_id: Annotated[str | None, Header()] = None) -> int:
    if last_event_id and not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 10):
        raise RequestError("expected the number of an event", param="Last-Event-ID")
    return int(last_event_id or 0)


From = Annotated[Caller, Depends(_caller)]
RequestId = Annotated[str, Depends(_request_id)]
#: The guard has read it: here it is described alone.
Access = Annotated[str | None, Query(alias="pass", description="in place of a key: see `POST /v1/passes`")]
Key = Annotated[str | None, Header(min_length=1, max_length=255)]
JSON_ONLY = [Depends(json_only)]


def build_api(
    service: VideoService,
    config: Config,
    keys: KeyCheck | None = None,
    *,
    behind_proxy: bool = False,
    exchange: Exchange | None = None,
) -> FastAPI:
    """The routes over `service`, which is started and closed with the application, and the page, behind a `Guard`.

    With an `exchange`, that is what starts it.
    Without `keys` it is for this machine alone. `behind_proxy`: Ray Serve's, which puts its own request id on answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if exchange is None:
            await service.start()
        yield
        await service.close()

    # no redirects: their address would be made of what the client calls the host
    app = FastAPI(
        title="ARLON-Ray", version=__version__, lifespan=lifespan, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    answer_errors(app)
    app.include_router(_videos(service))
    app.include_router(_drafts(service))
    app.include_router(_about(service, exchange))
    app.include_router(_passes(keys))
    mount_page(app)
    app.add_middleware(Guard, config.serve, keys, service.metrics, echo_request_id=not behind_proxy)
    app.openapi = partial(_described, app, keys is not None)  # type: ignore[method-assign]
    return app


def _videos(service: VideoService) -> APIRouter:
    router = APIRouter(prefix="/v1/videos", tags=["videos"])

    @router.post("", openapi_extra=VIDEO_BODY)
    async def create(request: Request, who: From, request_id: RequestId, idempotency_key: Key = None) -> Video:
        asked, picture = await read_video_request(request, service.model.config)
        return await service.create(asked, who, picture, idempotency_key, request_id)

    @router.post("/extensions", openapi_extra=EXTEND_BODY)
    async def extend(request: Request, who: From, request_id: RequestId, idempotency_key: Key = None) -> Video:
        return await service.extend(await read_extend_request(request), who, request_id, idempotency_key)

    @router.post("/{video_id}/remix", dependencies=JSON_ONLY)
    async def remix(
        video_id: str, asked: RemixRequest, who: From, request_id: RequestId, idempotency_key: Key = None
    ) -> Video:
        return await service.remix(video_id, asked, who, request_id, idempotency_key)

    _reading(router, service, "video")
    return router


def _drafts(service: VideoService) -> APIRouter:
    router = APIRouter(prefix="/v1/drafts", tags=["drafts"])

    @router.post("", dependencies=JSON_ONLY)
    async def create(asked: PlanRequest, who: From, request_id: RequestId, idempotency_key: Key = None) -> Video:
        picture = await first_frame(asked, service.model.config)
        return await service.create(asked, who, picture, idempotency_key, request_id)

    @router.get("/{video_id}/tokens")
    async def tokens(video_id: str, who: From) -> DraftTokens:
        return await service.tokens(video_id, who)

    @router.post("/{video_id}/segments/{index}/reroll", dependencies=JSON_ONLY)
    async def reroll(
        video_id: str, index: int, asked: RerollRequest, who: From, request_id: RequestId, idempotency_key: Key = None
    ) -> Video:
        return await service.reroll(video_id, index, asked, who, idempotency_key, request_id)

    _reading(router, service, "draft")
    return router


def _reading(router: APIRouter, service: VideoService, kind: Literal["video", "draft"]) -> None:
    """The routes that videos and drafts have alike."""

    @router.get("")
    async def page(
        who: From,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        videos, more = await service.page(kind, who, after, limit, order == "desc")
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoList(data=videos, first_id=first, last_id=last, has_more=more)

    @router.get("/{video_id}")
    async def retrieve(video_id: str, who: From, response: Response) -> Video:
        response.headers.update(_POLL)
        return await service.get(video_id, who, kind)

    @router.head("/{video_id}/content", include_in_schema=False)
    @router.get("/{video_id}/content", response_class=StreamingResponse)
    async def content(
        request: Request, video_id: str, who: From, variant: Variant = "video", access: Access = None
    ) -> Response:
        found = await service.content(video_id, who, kind, variant)
        media = "video/mp4" if variant == "video" else "image/png"
        name = f"{video_id}{Path(FILES[variant]).suffix}"
        return file_answer(found, request.headers, media, name, headers_only=request.method == "HEAD")

    @router.get("/{video_id}/stream", response_class=StreamingResponse)
    async def stream(video_id: str, who: From, stop_on_disconnect: bool = False) -> StreamingResponse:
        watched = await service.stream(video_id, who, kind)
        if stop_on_disconnect:
            watched = _or_stop(watched, partial(service.stop, video_id, who, kind))
        return StreamingResponse(watched, media_type="video/mp4", headers=_AT_ONCE)

    @router.get("/{video_id}/events", response_class=StreamingResponse)
    async def events(
        video_id: str, who: From, after: Annotated[int, Depends(_last_event)], stop_on_disconnect: bool = False
    ) -> StreamingResponse:
        happening = await service.events(video_id, after, who, kind)
        lines = (as_text(event) async for event in happening)
        if stop_on_disconnect:
            lines = _or_stop(lines, partial(service.stop, video_id, who, kind))
        return StreamingResponse(lines, media_type="text/event-stream", headers=_AT_ONCE)

    @router.get("/{video_id}/trace")
    async def trace(video_id: str, who: From) -> dict[str, Any]:
        stored = await service.stored(video_id, who, kind)
        return trace_of(stored.video, stored.job.request_id)

    @router.delete("/{video_id}")
    async def delete(video_id: str, who: From) -> VideoDeleted:
        await service.delete(video_id, who, kind)
        return VideoDeleted(id=video_id, object="video.deleted" if kind == "video" else "draft.deleted")


def _about(service: VideoService, exchange: Exchange | None) -> APIRouter:
    router = APIRouter(tags=["service"])
    since = int(time.time())

    def served() -> Model:
        return Model(id=service.model.config.name, created=since)

    @router.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served()])

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        if name != served().id:
            raise RequestError(f"model must be {served().id!r}", param="model", code="model_not_found", status=404)
        return served()

    @router.get("/v1/usage")
    async def usage(who: From) -> Usage:
        return await service.usage(who)

    @router.get("/healthz")
    async def health() -> dict[str, Any]:
        service.refuse_if_lost()
        bundle, change = service.model.bundle[:12], exchange.state if exchange else "none"
        return {"status": "ok", "model": served().id, "bundle": bundle, "change": change, **service.counts()}

    return router


def _passes(keys: KeyCheck | None) -> APIRouter:
    router = APIRouter(tags=["service"])

    @router.post("/v1/passes")
    async def make_pass(request: Request) -> Pass:
        if keys is None:
            raise RequestError("no keys are asked for here: a pass is not needed", code="keys_are_off", status=404)
        return Pass(value=keys.make_pass(request.state.key), expires_in=PASS_S)

    return router


_FAILURES = {
    status: {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorAnswer.__name__}"}}},
    }
    for status, description in (
        ("4XX", "the request cannot be served as it is"),
        ("5XX", "the service cannot serve it"),
    )
}


def _described(app: FastAPI, needs_key: bool) -> dict[str, Any]:
    """The description of the API: bodies as `serve.bodies` reads them, errors as they are answered, and keys."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        for operation in (each for path in described["paths"].values() for each in path.values()):
            operation["responses"].pop("422", None)  # FastAPI's own, which no route gives
            operation["responses"] |= _FAILURES
        for unused in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(unused, None)
        for model in (VideoRequest, ExtendRequest, ErrorAnswer):
            body = model.model_json_schema(ref_template="#/components/schemas/{model}")
            described["components"]["schemas"] |= {**body.pop("$defs", {}), model.__name__: body}
        _describe_keys(described, needs_key)
    return FastAPI.openapi(app)


def _describe_keys(described: dict[str, Any], needed: bool) -> None:
    """Say which routes take a key, so that clients that are made from the description, and its page, can send one."""
    described["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "a key of `python jobs/keys.py add NAME`"}
    }
    described["security"] = [{"key": []}] if needed else [{}, {"key": []}]  # {}: none will do
    for path in described["paths"].keys() & OPEN_PATHS:
        for operation in described["paths"][path].values():
            operation["security"] = []


async def _or_stop(watched: AsyncIterator[T], stop: Callable[[], Coroutine[Any, Any, None]]) -> AsyncGenerator[T]:
    """What is watched; `stop` is called if the client goes away before its end."""
    ended = False
    try:
        async for each in watched:
            yield each
        ended = True
    finally:
        if not ended:
            # the request's own task is being cancelled: a task of its own, and not of the request's context, does it
            task = asyncio.create_task(stop(), context=contextvars.Context())
            _stopping.add(task)
            task.add_done_callback(_stopping.discard)
