"""What goes over HTTP: the OpenAI Videos API with progressive prompts and sampling settings beyond it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from arlon_ray.config import Solver

Status = Literal["queued", "in_progress", "completed", "failed"]
SegmentStatus = Literal["queued", "planned", "rendering", "rendered", "completed"]

#: Seeds are kept where every client's JSON reader still has exact integers.
MAX_SEED = 2**53 - 1


class RequestError(Exception):
    """A request that is refused: `param` names the field, `status` is the HTTP status, `headers` go with it."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.retry_after_s, self.headers = retry_after_s, headers or {}


def _storable(text: str) -> str:
    """JSON can spell half a character, which no file, database or answer can hold, and PostgreSQL takes no zero."""
    if "\0" in text:
        raise ValueError("has a zero character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode") from None
    return text


def _number_or_text(value: Any) -> Any:
    """The OpenAI API writes seconds as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{value[:32]!r} is not a number") from None
    return value


Text = Annotated[str, AfterValidator(_storable)]
Seconds = Annotated[
    float,
    BeforeValidator(_number_or_text),
    Field(gt=0, le=1e6, allow_inf_nan=False, description="a number, or one as text"),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class SegmentPrompt(_Strict):
    """One part of a storyboard; all parts say how long they last, or none does."""

    prompt: Text
    seconds: Seconds | None = None
    cut: bool = Field(False, description="begins a new shot, instead of going on from what is seen")


class ImageReference(_Strict):
    """A picture in a JSON body, as the OpenAI API spells it; a multipart body has the file itself."""

    image_url: Text = Field(description="data:image/png;base64,…; also JPEG and WebP")


class PlanRequest(_Strict):
    """What a video is about, and how it is planned: body of `POST /v1/drafts`.

    Either `prompt` or `segments`; `num_segments` or `seconds` or neither. Segments with seconds of their own make a
    video of that length, and take no other.
    """

    prompt: Text | None = None
    segments: list[SegmentPrompt] | None = Field(None, min_length=1, description="progressive prompts, in order")
    num_segments: int | None = Field(None, ge=1)
    seconds: Seconds | None = None
    transition_latents: int = Field(
        0, ge=0, le=1000, description="latent frames (4 frames each) over which the texts of timed segments are blended"
    )
    size: Text | None = Field(None, description="WIDTHxHEIGHT; only the model's own")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    model: Text | None = None
    user: Text | None = Field(None, max_length=256, description="the caller's own mark, kept and not interpreted")
    input_reference: ImageReference | None = Field(None, description="the first frame: image to video")
    negative_prompt: Text | None = Field(None, description="what must not be seen: AR and DiT are guided away from it")
    deadline_s: float | None = Field(
        None, gt=0, le=1e7, allow_inf_nan=False, description="seconds from now; what is not finished then has failed"
    )


class VideoRequest(PlanRequest):
    """Body of `POST /v1/videos`: what a draft takes, and how it is rendered; or a draft that is to be rendered."""

    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    solver: Solver | None = Field(None, description="midpoint and heun evaluate the DiT twice a step, the others once")
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    token_guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    baseline: bool = Field(False, description="text only: no plan, no tokens")
    draft: Text | None = Field(None, description="the draft that is rendered: it says what the video is about")


class RemixRequest(_Strict):
    """Body of `POST /v1/videos/{id}/remix`."""

    prompt: Text


class VideoReference(_Strict):
    """A finished video."""

    id: Text


class ExtendRequest(_Strict):
    """Body of `POST /v1/videos/extensions`; the new part lasts at least `seconds`."""

    prompt: Text
    video: VideoReference
    seconds: Seconds | None = None
    num_segments: int | None = Field(None, ge=1)
    cut: bool = Field(False, description="begins a new shot, instead of going on from what is seen")


class RerollRequest(_Strict):
    """Body of `POST /v1/drafts/{id}/segments/{k}/reroll`."""

    prompt: Text | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    following: Literal["keep", "replan"] = Field("keep", description="what becomes of the segments behind it")


class SegmentTimes(BaseModel):
    """When the parts of one segment were worked on: start in seconds since the video's work began, and duration.

    None where a part did not run (yet); a baseline video has no AR.
    """

    index: int
    ar_start_s: float | None = None
    ar_s: float | None = None
    dit_start_s: float | None = None
    dit_s: float | None = None
    decode_start_s: float | None = None
    decode_s: float | None = None


class SegmentState(BaseModel):
    """One segment of a video as the client sees it."""

    index: int
    prompt: str
    status: SegmentStatus = "queued"
    frames: int
    seed: int
    cut: bool = Field(False, description="begins a new shot")


STORAGE_FULL = "storage_full"  # the code of an error that leaves the segments which were finished before


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Video(BaseModel):
    """The video object of the API, also of a draft. Times are Unix seconds; `seconds` is the playing time, as text."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video", "draft"] = "video"
    model: str
    bundle: str | None = Field(None, description="the beginning of the fingerprint of the bundle that makes it")
    status: Status = "queued"
    progress: int = Field(0, ge=0, le=100)
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    size: str
    prompt: str
    seed: int
    baseline: bool = False
    user: str | None = None
    remixed_from_video_id: str | None = None
    extended_from_video_id: str | None = None
    draft_id: str | None = None
    segments: list[SegmentState]
    timings: list[SegmentTimes] = []
    error: VideoError | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Model(BaseModel):
    """The model that is served; `created` is since when (Unix seconds)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "arlon-ray"


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Quota(BaseModel):
    """How much of something a tenant has, and may have; without `most` there is no limit but the service's."""

    used: int
    most: int | None


class Usage(BaseModel):
    """The answer to `GET /v1/usage`: what the caller's tenant has now, and may have. Days are those of UTC."""

    object: Literal["usage"] = "usage"
    tenant: str
    queued: Quota
    running: Quota
    segments_today: Quota
    stored_bytes: Quota


class Pass(BaseModel):
    """The answer to `POST /v1/passes`. `…/content?pass=VALUE` needs no key, for `expires_in` seconds from now on."""

    object: Literal["pass"] = "pass"
    value: str
    expires_in: int


class SegmentPlan(BaseModel):
    """The tokens of one segment, of shape [t', h', w'], in that order; those of the overlap included."""

    index: int
    shape: list[int]
    tokens: list[int]


class DraftTokens(BaseModel):
    """The answer to `GET /v1/drafts/{id}/tokens`."""

    segments: list[SegmentPlan]


class VideoDeleted(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["video.deleted", "draft.deleted"] = "video.deleted"
    deleted: bool = True


class WhatFailed(BaseModel):
    """`param` names the field that is wrong, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more, as the OpenAI API has it."""

    error: WhatFailed


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict:
    """An `ErrorAnswer` with that HTTP status."""
    kind: Literal["invalid_request_error", "server_error"] = (
        "server_error" if status >= 500 else "invalid_request_error"
    )
    # a field's name may come from the client, with half characters
    what = WhatFailed(message=_printable(message), type=kind, param=param and _printable(param), code=code)
    return ErrorAnswer(error=what).model_dump()


def _printable(text: str) -> str:
    return text[:500].encode(errors="replace").decode()
