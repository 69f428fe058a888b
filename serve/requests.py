"""What a request asks for, checked against what the served model makes."""

from __future__ import annotations

from collections.abc import Callable

from arlon_ray.config import Config
from arlon_ray.generation import (
    GenerationOptions,
    Scene,
    SegmentText,
    default_options,
    playing_time,
    segments_for,
    spread,
    storyboard,
)
from serve.schema import ExtendRequest, PlanRequest, RequestError, VideoRequest


def read_prompts(
    request: PlanRequest, config: Config, count_tokens: Callable[[str], int] | None = None
) -> list[SegmentText]:
    """Check the request against what this model makes, and return the text of each segment.

    `count_tokens` is the text encoder's: without it, what is too long for the encoder passes and is cut off there.
    Raises RequestError that names the field.
    """
    check_model(request, config)
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
    return spread(_scenes(request, prompts), count)


def _timed_prompts(request: PlanRequest, prompts: list[str], config: Config) -> list[SegmentText]:
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
    try:
        texts = storyboard(_scenes(request, prompts), config, transition=request.transition_latents)
    except ValueError as error:
        raise RequestError(str(error), param="segments") from None
    _check_length(len(texts), config, "segments")  # cuts make whole segments of each shot
    return texts


def _scenes(request: PlanRequest, prompts: list[str]) -> list[Scene]:
    if request.segments is None:
        return [Scene(prompt) for prompt in prompts]
    return [Scene(prompt, part.seconds, part.cut) for prompt, part in zip(prompts, request.segments, strict=True)]


def _check_length(segments: int, config: Config, field: str) -> None:
    if segments > config.serve.max_segments:
        limit = playing_time(config.serve.max_segments, config)
        raise RequestError(f"at most {config.serve.max_segments} segments ({limit} s)", param=field)


def read_text(text: str, field: str, config: Config, count_tokens: Callable[[str], int] | None = None) -> str:
    """One prompt. Raises RequestError that names the field."""
    limit = config.serve.max_prompt_characters
    if not text.strip():
        raise RequestError("the prompt is empty", param=field)
    if len(text) > limit:
        raise RequestError(f"the prompt has {len(text)} characters, at most {limit} are allowed", param=field)
    tokens = count_tokens(text.strip()) if count_tokens else 0
    if tokens > config.text.max_tokens:
        message = f"the prompt has {tokens} tokens, at most {config.text.max_tokens} are allowed"
        raise RequestError(message, param=field)
    return text.strip()


def extended_length(request: ExtendRequest, segments: int, config: Config) -> int:
    """Segments of a video of `segments` when the request has been added to it. Raises RequestError."""
    if request.num_segments is not None and request.seconds is not None:
        raise RequestError("num_segments and seconds exclude each other", param="seconds")
    count, field = segments + (request.num_segments or 1), "num_segments"
    if request.seconds is not None:
        count, field = segments + segments_for(request.seconds, config, segments), "seconds"
    _check_length(count, config, field)
    return count


def check_model(request: PlanRequest, config: Config) -> None:
    """Raises RequestError if another model or size is asked for."""
    if request.model is not None and request.model != config.name:
        raise RequestError(f"model must be {config.name!r}", param="model", code="model_not_found")
    size = f"{config.video.width}x{config.video.height}"
    if request.size is not None and request.size != size:
        raise RequestError(f"size must be {size}, the size this model makes", param="size")


def check_draft(request: VideoRequest) -> None:
    """Raises RequestError if a request for the rendering of a draft says anything that the draft says already."""
    fixed = (
        "prompt",
        "segments",
        "num_segments",
        "seconds",
        "transition_latents",
        "seed",
        "baseline",
        "input_reference",
    )
    for name in fixed:
        if getattr(request, name) != type(request).model_fields[name].default:
            raise RequestError("the draft says that already", param=name)


def options_of(request: PlanRequest, config: Config) -> GenerationOptions:
    """The configured sampling with what the request sets."""
    chosen: dict[str, object] = {"baseline": False, "negative_prompt": request.negative_prompt}
    if isinstance(request, VideoRequest):
        chosen |= {
            "steps": request.num_inference_steps,
            "solver": request.solver,
            "guidance_scale": request.guidance_scale,
            "token_guidance_scale": request.token_guidance_scale,
            "baseline": request.baseline or None,
        }
    return default_options(config.sampling, **chosen)


def _checked_prompts(request: PlanRequest, config: Config, count_tokens: Callable[[str], int] | None) -> list[str]:
    if request.segments is None:
        named = [("prompt", request.prompt or "")]
    else:
        named = [(f"segments.{index}.prompt", part.prompt) for index, part in enumerate(request.segments)]
    if len(named) > config.serve.max_segments:
        raise RequestError(f"at most {config.serve.max_segments} segments", param="segments")
    return [read_text(text, field, config, count_tokens) for field, text in named]
