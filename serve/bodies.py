"""Bodies of requests, as JSON or as a form, and the picture that may come with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from arlon_ray.config import Config
from serve.forms import nested
from serve.images import image_of_url, read_image
from serve.schema import ExtendRequest, PlanRequest, RequestError, VideoRequest
from serve.work import Frame

#: A picture takes ten bytes a pixel while it is decoded: no more than two at the same time.
_DECODERS = ThreadPoolExecutor(2, thread_name_prefix="pictures")
#: Of a form: three for each segment of a storyboard, and some.
_MOST_FIELDS = 1000
M = TypeVar("M", bound=BaseModel)


def described(model: type[BaseModel], form: Mapping[str, Any]) -> dict[str, Any]:
    """What a body may be, for the description of the API: JSON, or a form that has these properties and others."""
    json_schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    form_schema = {"type": "object", "properties": dict(form), "additionalProperties": True}
    content = {"application/json": {"schema": json_schema}, "multipart/form-data": {"schema": form_schema}}
    return {"requestBody": {"required": True, "content": content}}


VIDEO_BODY = described(
    VideoRequest,
    {
        "prompt": {"type": "string"},
        "input_reference": {"type": "string", "format": "binary"},
        "seconds": {"type": "string"},
        "size": {"type": "string"},
        "model": {"type": "string"},
    },
)
EXTEND_BODY = described(
    ExtendRequest, {"prompt": {"type": "string"}, "video[id]": {"type": "string"}, "seconds": {"type": "string"}}
)


async def read_video_request(request: Request, config: Config) -> tuple[VideoRequest, Frame | None]:
    """What is asked for, and the first frame uint8 [H, W, 3], of the model's size, if there is one.

    Raises RequestError and RequestValidationError.
    """
    body, file = await _body(request)
    if file is not None and file[0] != "input_reference":
        raise RequestError("a file: expected only in input_reference", param=file[0][:64])
    asked = _valid(VideoRequest, body)
    return asked, await first_frame(asked, config, None if file is None else file[1])


async def read_extend_request(request: Request) -> ExtendRequest:
    """What is asked for. Raises RequestError and RequestValidationError."""
    body, file = await _body(request)
    if file is not None:
        raise RequestError("a file: expected the id of a finished video, as video[id]", param=file[0][:64])
    return _valid(ExtendRequest, body)


def json_only(request: Request) -> None:
    """Raises RequestError (415) for a body of another kind."""
    if not _is_json(kind := _kind(request)):
        raise _unsupported(kind, "application/json")


async def first_frame(asked: PlanRequest, config: Config, picture: bytes | None = None) -> Frame | None:
    """The picture of a request, scaled and cut to the model's size. Raises RequestError."""
    url = asked.input_reference.image_url if asked.input_reference else None
    if picture is None and url is None:
        return None
    if picture is not None and url is not None:
        raise RequestError("is there twice", param="input_reference")
    return await asyncio.get_running_loop().run_in_executor(_DECODERS, _fitted, picture, url, config)


def _fitted(picture: bytes | None, url: str | None, config: Config) -> Frame:
    most, size = config.serve.max_image_pixels, (config.video.width, config.video.height)
    if picture is not None:
        pixels = read_image(picture, most)
    else:
        pixels = image_of_url(url or "", config.serve.max_upload_bytes, most)
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), size, Image.Resampling.LANCZOS))


async def _body(request: Request) -> tuple[Any, tuple[str, bytes] | None]:
    """The body, and the file that may come with it: the field's name, and what it holds. Raises RequestError."""
    kind = _kind(request)
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _form(request)
    if _is_json(kind):
        return await _json(request), None
    raise _unsupported(kind, "application/json or multipart/form-data")


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _is_json(kind: str) -> bool:
    return kind == "application/json" or kind.endswith("+json")


def _unsupported(kind: str, expected: str) -> RequestError:
    message = f"content-type {kind[:64]!r}: expected {expected}"
    return RequestError(message, code="unsupported_media_type", status=415)


def _valid(model: type[M], body: Any) -> M:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON", code="invalid_json", status=400) from None


async def _form(request: Request) -> tuple[dict[str, Any], tuple[str, bytes] | None]:
    try:
        form = await request.form(max_files=1, max_fields=_MOST_FIELDS)
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}", code="invalid_form", status=400) from None
    fields: list[tuple[str, str]] = []
    file: tuple[str, bytes] | None = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            file = name, await value.read()
        else:
            fields.append((name, value))
    return nested(fields), file
