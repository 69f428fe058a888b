"""What goes over HTTP: the OpenAI Videos API with progressive prompts and sampling settings beyond it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from arlon_ray.config import GROUP_FRAMES, Config
from arlon_ray.generation import GenerationOptions, default_options, spread_prompts

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


Text = Annotated[str, AfterValidator(_storable)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class SegmentPrompt(_Strict):
    """One part of a storyboard."""

    prompt: Text


class VideoRequest(_Strict):
    """Body of `POST /v1/videos`. Either `prompt` or `segments`; `num_segments` or `seconds` or neither."""

    prompt: Text | None = None
    segments: list[SegmentPrompt] | None = Field(None, min_length=1, description="progressive prompts, in order")
    num_segments: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0, le=1e6, allow_inf_nan=False, description="a number, or one as text")
    size: Text | None = Field(None, description="WIDTHxHEIGHT; only the model's own")
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    token_guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    baseline: bool = Field(False, description="text only: no plan, no tokens")
    model: Text | None = None
    user: Text | None = Field(None, max_length=256, description="the caller's own mark, kept and not interpreted")

    @field_validator("seconds", mode="before")
    @classmethod
    def _number_or_text(cls, value: Any) -> Any:
        """The OpenAI API writes seconds as text."""
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise ValueError(f"{value[:32]!r} is not a number") from None
        return value


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


def new_frames(config: Config, index: int) -> int:
    """Frames that segment `index` adds to the video: the overlap was rendered by the segment before."""
    overlap = config.segment.overlap_groups if index else 0
    return (config.segment.groups - overlap) * GROUP_FRAMES


def segments_for(seconds: float, config: Config) -> int:
    """The fewest whole segments that last at least `seconds`."""
    # less a thousandth of a frame, so that asking for the playing time of a video gives its length again
    frames = math.ceil(seconds * config.video.fps - 1e-3)
    rest = max(0, frames - new_frames(config, 0))
    return 1 + math.ceil(rest / new_frames(config, 1))


def playing_time(segments: int, config: Config) -> str:
    """Seconds that a video of `segments` segments lasts, as text."""
    frames = new_frames(config, 0) + (segments - 1) * new_frames(config, 1)
    return format(frames / config.video.fps, ".10g")


def read_prompts(request: VideoRequest, config: Config, count_tokens: Callable[[str], int] | None = None) -> list[str]:
    """Check the request against what this model makes, and return one prompt per segment.

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
    count = request.num_segments or len(prompts)
    field = "num_segments" if request.num_segments else "segments"
    if request.seconds is not None:
        count, field = segments_for(request.seconds, config), "seconds"
    if count > config.serve.max_segments:
        limit = playing_time(config.serve.max_segments, config)
        raise RequestError(f"at most {config.serve.max_segments} segments ({limit} s)", param=field)
    if count < len(prompts):
        raise RequestError(f"{len(prompts)} prompts need at least as many segments, not {count}", param=field)
    return spread_prompts(prompts, count)


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
