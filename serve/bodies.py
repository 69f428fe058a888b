"""Bodies of requests, as JSON or as a form, and the picture that may come with them."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, ImageOps
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from arlon_ray.config import Config
from serve.images import image_of_url, read_image
from serve.schema import PlanRequest, RequestError, VideoRequest
from serve.work import Frame

#: A picture takes ten bytes a pixel while it is decoded: no more than two at the same time.
_DECODERS = ThreadPoolExecutor(2, thread_name_prefix="pictures")
#: Fields of a form that are text even where they look like something else; the others are read as JSON.
_TEXT = {"prompt", "seconds", "size", "model", "user", "negative_prompt", "draft"}
#: What a body may be, for the description of the API. The components are those of other routes.
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/VideoRequest"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "prompt": {"type": "string"},
                        "input_reference": {"type": "string", "format": "binary"},
                        "seconds": {"type": "string"},
                        "size": {"type": "string"},
                        "model": {"type": "string"},
                    },
                    "additionalProperties": True,
                }
            },
        },
    }
}


async def read_video_request(request: Request, config: Config) -> tuple[VideoRequest, Frame | None]:
    """What is asked for, and the first frame uint8 [H, W, 3], of the model's size, if there is one.

    Raises RequestError and RequestValidationError.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    picture: bytes | None = None
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        body, picture = await _form(request)
    elif kind == "application/json" or kind.endswith("+json"):
        body = await _json(request)
    else:
        message = f"content-type {kind[:64]!r}: expected application/json or multipart/form-data"
        raise RequestError(message, code="unsupported_media_type", status=415)
    try:
        asked = VideoRequest.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in error.errors()]) from None
    return asked, await first_frame(asked, config, picture)


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


async def _json(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON", code="invalid_json", status=400) from None


async def _form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    try:
        form = await request.form(max_files=1, max_fields=64)
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}", code="invalid_form", status=400) from None
    body: dict[str, Any] = {}
    picture: bytes | None = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "input_reference":
                raise RequestError("a file: expected only in input_reference", param=name[:64])
            picture = await value.read()
        elif name in body:
            raise RequestError("is there twice", param=name[:64])
        else:
            body[name] = value if name in _TEXT else _value(value)
    return body, picture


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
