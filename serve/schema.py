"""What goes over HTTP: the OpenAI Videos API with progressive prompts and sampling settings beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from arlon_ray.config import Config
from arlon_ray.generation import (
    GenerationOptions,
    Scene,
    SegmentText,
    default_options,
    playing_time,
    segments_for,
    spread_prompts,
    storyboard,
)

Status = Literal["queued", "in_progress", "completed", "failed"]
SegmentStatus = Literal["queued", "planned", "rendering", "rendered", "completed"]

#: Seeds are kept where every client's JSON reader still has exact integers.
MAX_SEED = 2**53 - 1


class RequestError(Exception):
    """A request that is refused: `param` names the field, `status` is the HTTP status."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 422,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.retry_after_s = retry_after_s


def _storable(text: str) -> str:
    """JSON can spell half a character, which no file, database or answer can hold."""
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


class VideoRequest(_Strict):
    """Body of `POST /v1/videos`. Either `prompt` or `segments`; `num_segments` or `seconds` or neither.

    Segments with seconds of their own make a video of that length, and take no other.
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
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    token_guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    baseline: bool = Field(False, description="text only: no plan, no tokens")
    model: Text | None = None
    user: Text | None = Field(None, max_length=256, description="the caller's own mark, kept and not interpreted")


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


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Video(BaseModel):
    """The video object of the API. Times are Unix seconds; `seconds` is the playing time, as text."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status = "queued"
    progress: int = Field(0, ge=0, le=100)
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    seconds: str
    size: str
    prompt: str
    seed: int
    baseline: bool = False
    user: str | None = None
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


class VideoDeleted(BaseModel):
    """The answer to DELETE."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


def error_body(message: str, *, param: str | None = None, code: str | None = None, server: bool = False) -> dict:
    """An error in the form of the OpenAI API."""
    kind = "server_error" if server else "invalid_request_error"
    # a field's name may come from the client, with half characters
    message, param = _printable(message), param and _printable(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _printable(text: str) -> str:
    return text[:500].encode(errors="replace").decode()


def read_prompts(
    request: VideoRequest, config: Config, count_tokens: Callable[[str], int] | None = None
) -> list[SegmentText]:
    """Check the request against what this model makes, and return the text of each segment.

    `count_tokens` is the text encoder's: without it, what is too long for the encoder passes and is cut off there.
    Raises RequestError that names the field.
    """
    if request.model is not None and request.model != config.name:
        raise RequestError(f"model must be {config.name!r}", param="model", code="model_not_found")
    size = f"{config.video.width}x{config.video.height}"
    if request.size is not None and request.size != size:
        raise RequestError(f"size must be {size}, the size this model makes", param="size")
    if (request.prompt is None) == (request.segments is None):
        field = "prompt" if request.prompt is None else "segments"
        raise RequestError("exactly one of prompt and segments is required", param=field)
    prompts = _checked_prompts(request, config, count_tokens)
    if request.num_segments is not None and request.seconds is not None:
        raise RequestError("num_segments and seconds exclude each other", param="seconds")
    if request.segments and any(part.seconds is not None for part in request.segments):
        return _timed_prompts(request, prompts, config)
    if request.transition_latents:
        raise RequestError("only segments with seconds of their own are blended", param="transition_latents")
    count = request.num_segments or len(prompts)
    field = "num_segments" if request.num_segments else "segments"
    if request.seconds is not None:
        count, field = segments_for(request.seconds, config), "seconds"
    _check_length(count, config, field)
    if count < len(prompts):
        raise RequestError(f"{len(prompts)} prompts need at least as many segments, not {count}", param=field)
    return list[SegmentText](spread_prompts(prompts, count))


def _timed_prompts(request: VideoRequest, prompts: list[str], config: Config) -> list[SegmentText]:
    """The text of each segment where the parts say how long they last."""
    parts = request.segments or []
    if request.num_segments is not None or request.seconds is not None:
        field = "seconds" if request.seconds is not None else "num_segments"
        raise RequestError("the segments' own seconds say how long the video is", param=field)
    for index, part in enumerate(parts):
        if part.seconds is None:
            raise RequestError("all segments say how long they last, or none does", param=f"segments.{index}.seconds")
    needed = segments_for(sum(part.seconds or 0.0 for part in parts), config)
    _check_length(needed, config, "segments")
    scenes = [Scene(prompt, part.seconds) for prompt, part in zip(prompts, parts, strict=True)]
    try:
        return storyboard(scenes, config, transition=request.transition_latents)
    except ValueError as error:
        raise RequestError(str(error), param="segments") from None


def _check_length(segments: int, config: Config, field: str) -> None:
    if segments > config.serve.max_segments:
        limit = playing_time(config.serve.max_segments, config)
        raise RequestError(f"at most {config.serve.max_segments} segments ({limit} s)", param=field)


def options_of(request: VideoRequest, config: Config) -> GenerationOptions:
    """The configured sampling with what the request sets."""
    return default_options(
        config.sampling,
        steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        token_guidance_scale=request.token_guidance_scale,
        baseline=request.baseline or None,
    )


def _checked_prompts(request: VideoRequest, config: Config, count_tokens: Callable[[str], int] | None) -> list[str]:
    if request.segments is None:
        named = [("prompt", request.prompt or "")]
    else:
        named = [(f"segments.{index}.prompt", part.prompt) for index, part in enumerate(request.segments)]
    if len(named) > config.serve.max_segments:
        raise RequestError(f"at most {config.serve.max_segments} segments", param="segments")
    limit = config.serve.max_prompt_characters
    for field, text in named:
        if not text.strip():
            raise RequestError("the prompt is empty", param=field)
        if len(text) > limit:
            raise RequestError(f"the prompt has {len(text)} characters, at most {limit} are allowed", param=field)
        tokens = count_tokens(text.strip()) if count_tokens else 0
        if tokens > config.text.max_tokens:
            message = f"the prompt has {tokens} tokens, at most {config.text.max_tokens} are allowed"
            raise RequestError(message, param=field)
    return [text.strip() for _, text in named]
