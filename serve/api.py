"""HTTP: the OpenAI Videos API over a `VideoService`, and the Ray Serve deployment that runs it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from arlon_ray import __version__
from arlon_ray.config import Config
from arlon_ray.models.text import load_token_counter
from serve.handles import HandleStages
from serve.jobs_store import JobStore
from serve.schema import Model, ModelList, RequestError, Video, VideoDeleted, VideoList, VideoRequest, error_body
from serve.service import VideoService

API = "VideoAPI"


def build_api(service: VideoService, model: str) -> FastAPI:
    """The routes over `service`, which is closed when the application ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="ARLON-Ray", version=__version__, lifespan=lifespan)
    served = Model(id=model, created=int(time.time()))
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _broken)

    @app.post("/v1/videos")
    async def create(request: VideoRequest) -> Video:
        return await service.create(request)

    @app.get("/v1/videos")
    async def page(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        videos, more = await service.page(after, limit, order == "desc")
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoList(data=videos, first_id=first, last_id=last, has_more=more)

    @app.get("/v1/videos/{video_id}")
    async def retrieve(video_id: str) -> Video:
        return await service.get(video_id)

    @app.get("/v1/videos/{video_id}/content", response_class=FileResponse)
    async def content(video_id: str) -> FileResponse:
        return FileResponse(await service.content(video_id), media_type="video/mp4", filename=f"{video_id}.mp4")

    @app.get("/v1/videos/{video_id}/stream", response_class=StreamingResponse)
    async def stream(video_id: str) -> StreamingResponse:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies too send what comes at once
        return StreamingResponse(await service.stream(video_id), media_type="video/mp4", headers=headers)

    @app.delete("/v1/videos/{video_id}")
    async def delete(video_id: str) -> VideoDeleted:
        await service.delete(video_id)
        return VideoDeleted(id=video_id)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        if name != model:
            raise RequestError(f"model must be {model!r}", param="model", code="model_not_found", status=404)
        return served

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": model, **service.counts()}

    return app


@serve.ingress()
class VideoAPI:
    """The ingress. It holds no model, only the text encoder's tokenizer.

    One replica, because the queue and the running jobs live in its memory.
    """

    def __init__(
        self,
        config: Config,
        data_dir: str,
        ar: DeploymentHandle | None,
        dit: DeploymentHandle,
        decoder: DeploymentHandle,
    ) -> None:
        own = serve.get_deployment_handle(API, serve.get_replica_context().app_name)
        self._model = config.name
        self._stages = HandleStages(ar, dit, decoder, own)
        folder = Path(data_dir)
        store, count_tokens = JobStore.in_folder(folder), load_token_counter(config.text)
        self._service = VideoService(config, store, self._stages, folder / "videos", count_tokens)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._model)

    async def may_plan(self, job_id: str, index: int) -> bool:
        """Called by the AR's replicas; see `HandleStages.may_plan`."""
        return await self._stages.may_plan(job_id, index)


def bind_api(config: Config, data_dir: str, stages: tuple[serve.Application | None, ...]) -> serve.Application:
    """The ingress over the bound stages."""
    deployment = serve.deployment(
        name=API,
        num_replicas=1,
        # status requests and downloads, not work: the queue of jobs has its own bound
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=5,
    )(VideoAPI)
    return deployment.bind(config, data_dir, *stages)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    body = error_body(error.message, param=error.param, code=error.code)
    return JSONResponse(body, status_code=error.status, headers=headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """A body or query that does not fit the schema: the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body("the body is not valid JSON", code="invalid_json"), status_code=400)
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(first["type"], "invalid_value")
    message = "unknown field" if code == "unknown_field" else first["msg"].removeprefix("Value error, ")
    text = f"{param}: {message}" if param else message
    return JSONResponse(error_body(text, param=param, code=code), status_code=422)


async def _no_route(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(str(error.detail)), status_code=error.status_code, headers=error.headers)


async def _broken(_: Request, error: Exception) -> JSONResponse:
    # the error itself is in the log; a client gets no path and no traceback
    return JSONResponse(error_body("internal error", code="internal_error", server=True), status_code=500)
