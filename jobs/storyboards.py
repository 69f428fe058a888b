"""What a video is about, as the command line and files say it: prompts, how long each lasts, and how they meet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from arlon_ray.artifact import one_line
from arlon_ray.config import Config
from arlon_ray.generation import Scene, SegmentText, playing_time, segments_for, spread, storyboard
from arlon_ray.models.text import load_token_counter
from jobs.command_line import InputError, existing

#: Segments of a video, at most: more hours than anybody waits for.
MOST_SEGMENTS = 100_000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    cut: bool = False


def add_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say what a video is about."""
    flags.add_argument("--prompt", action="append", help="repeat it for progressive prompts")
    flags.add_argument(
        "--seconds", type=float, action="append", metavar="S", help="length of the video, or once for each prompt"
    )
    flags.add_argument("--segments", type=int, metavar="N", help="length in segments (default: one a prompt)")
    flags.add_argument(
        "--cut",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="prompt N begins a new shot, instead of going on from what is seen (repeatable; the first one of a video "
        "has nothing to cut from)",
    )
    flags.add_argument(
        "--storyboard",
        metavar="FILE",
        help="YAML or JSON: a list of {prompt: …, seconds: …, cut: true}, instead of --prompt",
    )
    flags.add_argument(
        "--transition", type=int, default=0, metavar="N",
        help="latent frames (4 frames each) over which a prompt's text is blended with the one before (default: 0)",
    )  # fmt: skip


def segment_texts(
    arguments: argparse.Namespace, scenes: list[Scene], config: Config, behind: int = 0
) -> list[SegmentText]:
    """The text of every segment of these scenes, behind so many that are there. InputError names the flag."""
    _check_lengths(scenes, config, "--storyboard" if arguments.storyboard else "--prompt")
    flag, count = _length(arguments, scenes, config, behind)
    if scenes[0].seconds is not None:
        if arguments.segments is not None:
            raise InputError("--segments: how long the prompts last says already how long the video is")
        try:
            return storyboard(scenes, config, transition=arguments.transition, behind=behind)
        except ValueError as error:
            raise InputError(f"{'--storyboard' if arguments.storyboard else '--seconds'}: {error}") from None
    if arguments.transition:
        raise InputError("--transition: needs to know how long each prompt lasts: give --seconds once for each")
    try:
        return spread(scenes, count, behind)
    except ValueError as error:
        raise InputError(f"{flag if arguments.segments is None else '--segments'}: {error}") from None


def read_scenes(arguments: argparse.Namespace) -> list[Scene]:
    """Prompts with their durations, all of them or none. Raises InputError that names the flag."""
    scenes = _scenes(arguments)
    if any(not scene.prompt.strip() for scene in scenes):
        raise InputError(f"{'--storyboard' if arguments.storyboard else '--prompt'}: empty prompt; describe the video")
    return scenes


def _scenes(arguments: argparse.Namespace) -> list[Scene]:
    if bool(arguments.prompt) == bool(arguments.storyboard):
        raise InputError("expected --prompt or --storyboard, and not both")
    if arguments.transition < 0:
        raise InputError(f"--transition {arguments.transition}: expected 0 or more latent frames")
    seconds = arguments.seconds or []
    for length in seconds:
        if not 0 < length < float("inf"):
            raise InputError(f"--seconds {length:g}: expected a number above 0")
    if arguments.segments is not None and seconds:
        raise InputError("--segments and --seconds exclude each other: both say how long the video is")
    if arguments.storyboard:
        if seconds:
            raise InputError("--seconds: the storyboard says how long its parts last")
        if arguments.cut:
            raise InputError("--cut: the storyboard says where its cuts are (cut: true)")
        return _read(existing(arguments.storyboard, "--storyboard"))
    prompts = arguments.prompt
    if len(seconds) > 1 and len(seconds) != len(prompts):
        raise InputError(
            f"--seconds is there {len(seconds)} times, --prompt {len(prompts)} times: expected once, or as often"
        )
    for number in arguments.cut:
        if not 1 <= number <= len(prompts):
            raise InputError(f"--cut {number}: expected the number of a prompt, 1 to {len(prompts)}")
    each = seconds if len(prompts) == len(seconds) and len(prompts) > 1 else [None] * len(prompts)
    parts = enumerate(zip(prompts, each, strict=True), start=1)
    return [Scene(prompt, length, number in arguments.cut) for number, (prompt, length) in parts]


def _read(path: Path) -> list[Scene]:
    try:
        found: Any = yaml.safe_load(path.read_text())
        parts = TypeAdapter(list[_Part]).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"--storyboard {path}: {where}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        raise InputError(f"--storyboard {path}: cannot be read: {one_line(error)}") from None
    if not parts:
        raise InputError(f"--storyboard {path}: empty; expected a list of prompts")
    if len({part.seconds is None for part in parts}) > 1:
        raise InputError(f"--storyboard {path}: all parts say how many seconds they last, or none does")
    return [Scene(part.prompt, part.seconds, part.cut) for part in parts]


def _length(arguments: argparse.Namespace, scenes: list[Scene], config: Config, behind: int) -> tuple[str, int]:
    """What says how long the video is, and in how many segments (without what cuts add).

    Raises InputError for fewer than 1, and for more than are made at a time.
    """
    if arguments.segments is not None:
        flag, count = f"--segments {arguments.segments}", arguments.segments
        if count < 1:
            raise InputError(f"{flag}: expected 1 or more")
    elif arguments.seconds or scenes[0].seconds is not None:
        seconds = arguments.seconds[0] if scenes[0].seconds is None else sum(scene.seconds or 0.0 for scene in scenes)
        flag = "--storyboard" if arguments.storyboard else f"--seconds {seconds:g}"
        count = segments_for(min(seconds, 1e12), config, behind)
    else:
        flag, count = "--storyboard" if arguments.storyboard else "--prompt", len(scenes)
    if count > MOST_SEGMENTS:
        limit = playing_time(MOST_SEGMENTS, config)
        raise InputError(f"{flag}: expected at most {MOST_SEGMENTS} segments ({limit} s)")
    return flag, count


def _check_lengths(scenes: list[Scene], config: Config, flag: str) -> None:
    """Raises InputError for a prompt that the text encoder would cut off."""
    count_tokens, limit = load_token_counter(config.text), config.text.max_tokens
    for prompt in dict.fromkeys(scene.prompt for scene in scenes):
        if (tokens := count_tokens(prompt)) > limit:
            raise InputError(f"{flag}: {tokens} tokens, at most {limit} ({' '.join(prompt.split())[:40]!r}…)")
