"""What a request becomes: the video object that clients see, and the job that makes it."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace

from arlon_ray.config import Config
from arlon_ray.generation import (
    GenerationOptions,
    Scene,
    SegmentText,
    begins_shot,
    new_frames,
    playing_time,
    prompt_of,
    spread,
    with_words,
)
from serve.job_store import Stored
from serve.requests import check_draft, check_model, extended_length, options_of, read_prompts, read_text
from serve.schema import (
    ExtendRequest,
    PlanRequest,
    RemixRequest,
    RequestError,
    RerollRequest,
    SegmentState,
    SegmentTimes,
    Video,
    VideoRequest,
)
from serve.work import DRAFT, VIDEO, Job

CountTokens = Callable[[str], int] | None
New = tuple[Video, Job]


def asked(request: PlanRequest, config: Config, count_tokens: CountTokens = None) -> New:
    """A new video, or a new draft if the request is no more than a plan's. Raises RequestError."""
    prompts = read_prompts(request, config, count_tokens)
    _check_negative(request, config, count_tokens)
    draft = not isinstance(request, VideoRequest)
    if draft and config.sampling.baseline:
        raise RequestError("this service has no AR: there are no drafts", code="no_ar")
    said = [part.prompt for part in request.segments or ()] or [request.prompt or ""]
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    kind = DRAFT if draft else VIDEO
    return _new(kind, prompts, said, seed, options_of(request, config), config, request.user)


def remixed(stored: Stored, request: RemixRequest, config: Config, count_tokens: CountTokens = None) -> New:
    """The same with another text: seed, length and settings as they were."""
    prompt, old = read_text(request.prompt, "prompt", config, count_tokens), stored.job
    prompts = [prompt] * len(old.prompts)
    video, job = _new(VIDEO, prompts, [prompt], old.seed, old.options, config, stored.video.user)
    return video.model_copy(update={"remixed_from_video_id": stored.video.id}), job


def extended(stored: Stored, request: ExtendRequest, config: Config, count_tokens: CountTokens = None) -> New:
    """A finished video and more segments behind it: what a longer one with the same seed would have been."""
    prompt, old = read_text(request.prompt, "prompt", config, count_tokens), stored.job
    count = extended_length(request, len(old.prompts), config)
    there = len(old.prompts)
    prompts = [*old.prompts, *spread([Scene(prompt, cut=request.cut)], count - there, behind=there)]
    video, job = _new(VIDEO, prompts, [stored.video.prompt, prompt], old.seed, old.options, config, stored.video.user)
    for segment in video.segments[: len(old.prompts)]:
        segment.status = "completed"
    job = replace(job, plan_seeds=old.plan_seeds, bundle=old.bundle, bundle_path=old.bundle_path)
    return video.model_copy(update={"extended_from_video_id": stored.video.id}), job


def rendered(draft: Stored, request: VideoRequest, config: Config, count_tokens: CountTokens = None) -> New:
    """The video of a draft: its texts, seed and plan. Raises RequestError for what the draft says already."""
    check_draft(request)
    check_model(request, config)
    _check_negative(request, config, count_tokens)
    old = draft.job
    options = options_of(request, config)
    if request.negative_prompt is None:
        options = options.model_copy(update={"negative_prompt": old.options.negative_prompt})
    video, job = _new(
        VIDEO, old.prompts, [draft.video.prompt], old.seed, options, config, request.user or draft.video.user
    )
    job = replace(job, plan_seeds=old.plan_seeds, bundle=old.bundle, bundle_path=old.bundle_path)
    return video.model_copy(update={"draft_id": draft.video.id}), job


def rerolled(
    draft: Stored, index: int, request: RerollRequest, config: Config, count_tokens: CountTokens = None
) -> New:
    """A draft whose segment `index` (with "replan" also those behind it) is to be planned with another seed."""
    old, video = draft.job, draft.video.model_copy(deep=True)
    if not 0 <= index < len(old.prompts):
        raise RequestError(
            f"the draft has segments 0 to {len(old.prompts) - 1}", param="index", code="not_found", status=404
        )
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    prompts, seeds = list(old.prompts), [old.plan_seed(i) for i in range(len(old.prompts))]
    anew = tuple(range(index, len(prompts) if request.following == "replan" else index + 1))
    for i in anew:
        seeds[i] = seed
        video.segments[i].seed = seed
    if request.prompt is not None:
        text = read_text(request.prompt, "prompt", config, count_tokens)
        prompts[index], video.segments[index].prompt = with_words(prompts[index], text), text
        video.prompt = "\n".join(dict.fromkeys(segment.prompt for segment in video.segments))
    for segment in video.segments[index:]:
        segment.status = "queued"
    update = {"status": "queued", "progress": 0, "error": None, "started_at": None, "completed_at": None}
    job = replace(old, prompts=tuple(prompts), plan_seeds=tuple(seeds), anew=anew)
    return video.model_copy(update=update), job


def _check_negative(request: PlanRequest, config: Config, count_tokens: CountTokens) -> None:
    if request.negative_prompt:
        read_text(request.negative_prompt, "negative_prompt", config, count_tokens)


def _new(
    kind: str,
    prompts: Sequence[SegmentText],
    said: Sequence[str],
    seed: int,
    options: GenerationOptions,
    config: Config,
    user: str | None,
) -> New:
    video = Video(
        id=kind + uuid.uuid4().hex,
        object="draft" if kind == DRAFT else "video",
        model=config.name,
        created_at=int(time.time()),
        seconds=playing_time(len(prompts), config),
        size=f"{config.video.width}x{config.video.height}",
        prompt="\n".join(dict.fromkeys(prompt.strip() for prompt in said)),
        seed=seed,
        baseline=options.baseline,
        user=user,
        segments=[
            SegmentState(
                index=index,
                prompt=prompt_of(text, config.segment.overlap_latents if index else 0),
                frames=new_frames(config, index),
                seed=seed,
                cut=index > 0 and begins_shot(prompts, index),
            )
            for index, text in enumerate(prompts)
        ],
        timings=[SegmentTimes(index=index) for index in range(len(prompts))],
    )
    return video, Job(video.id, tuple(prompts), seed, options)
