"""Make a video from a bundle in this process, without Ray: `python jobs/generate.py --bundle DIR --prompt "…"`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from arlon_ray.artifact import one_line
from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_FRAMES, Config
from arlon_ray.generation import (
    GenerationOptions,
    Given,
    VideoGenerator,
    default_options,
    given_clip,
    given_picture,
    spread_prompts,
)
from arlon_ray.generation.video import encode_fragment, join_fragments
from arlon_ray.models.text import load_token_counter
from data_pipeline.decode import Clip, fit
from data_pipeline.footage import FootageError, read_picture
from jobs.command_line import BOX, InputError, existing, parser, run

#: Frames of a clip that goes before the video which are held at a time.
SHOWN_AT_ONCE = 4 * GROUP_FRAMES


@dataclass(frozen=True)
class Start:
    """What a video starts from, and the frames that are shown before it: a clip that it goes on from."""

    given: Given | None = None
    before: Clip | None = None


def make_video(
    generator: VideoGenerator,
    prompts: list[str],
    path: Path,
    seed: int,
    options: GenerationOptions,
    start: Start | None = None,
) -> int:
    """Write the video of one prompt a segment to `path`; returns its frames. Memory does not grow with its length."""
    start = start or Start()
    fragments: list[Path] = []
    fps, frames = generator.bundle.config.video.fps, 0
    with tempfile.TemporaryDirectory(prefix="arlon-video-") as folder:

        def add(part: np.ndarray) -> int:
            fragments.append(Path(folder) / f"{len(fragments):06d}.mp4")
            fragments[-1].write_bytes(encode_fragment(part, fps))
            return len(part)

        if start.before is not None:
            frames += sum(add(part) for part in start.before.parts(SHOWN_AT_ONCE))
        for index, part in enumerate(generator.generate(prompts, seed, options, start.given)):
            frames += add(part)
            print(f"segment {index + 1}/{len(prompts)}  {frames} frames", file=sys.stderr)
        join_fragments(fragments, path)
    return frames


def read_start(bundle: Bundle, image: str | None, video: str | None) -> Start:
    """--image or --video, scaled and cut to the bundle's size (and rate). Raises InputError for what cannot be used."""
    size = (bundle.config.video.height, bundle.config.video.width)
    flag = "--image" if image else "--video"
    if not image and not video:
        return Start()
    path = existing(image or str(video), flag)
    try:
        if image:
            return Start(given_picture(bundle, fit(read_picture(path)[None], *size)[0]))
        clip = Clip(str(path), *size, bundle.config.video.fps)
        count = min(clip.frames, bundle.config.segment.overlap_groups * GROUP_FRAMES)
        return Start(given_clip(bundle, clip.read(clip.frames - count, count)), clip)
    except (FootageError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{flag} {path}: {one_line(error)}") from None


def device_of(config: Config) -> str:
    """Where the bundle's configuration wants the models: "cpu" or "cuda". Raises InputError if there is no GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("the bundle is configured with device=cuda, but torch finds no GPU here")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def open_bundle(path: Path) -> Bundle:
    """The bundle, on the device that its own configuration asks for."""
    bundle = load_bundle(path)
    device = device_of(bundle.config)
    return bundle if device == "cpu" else load_bundle(path, device)


def check_output(path: Path) -> None:
    """Raises InputError if no file can be written there. Creates nothing."""
    if os.path.isdir(path):
        raise InputError(f"--output {path}: is a folder; expected the name of an mp4")
    above = next(folder for folder in path.parents if os.path.exists(folder))
    if not os.path.isdir(above):
        raise InputError(f"--output {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"--output {path}: {above} is not writable")


def check_prompts(prompts: list[str], config: Config) -> None:
    """Raises InputError if the text encoder would cut a prompt off."""
    count_tokens, limit = load_token_counter(config.text), config.text.max_tokens
    for prompt in prompts:
        if (tokens := count_tokens(prompt)) > limit:
            raise InputError(f"--prompt: {tokens} tokens, at most {limit} ({' '.join(prompt.split())[:40]!r}…)")


def main() -> None:
    """Command line."""
    flags = parser("Make a video from a bundle, without Ray.", output="video.mp4", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR", help="model bundle (default: weights/tiny)")
    flags.add_argument("--prompt", action="append", required=True, help="repeat it for progressive prompts")
    flags.add_argument("--segments", type=int, metavar="N", help="length of the video (default: one a prompt)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--steps", type=int, help="denoising steps")
    flags.add_argument("--guidance-scale", type=float)
    flags.add_argument("--token-guidance-scale", type=float)
    flags.add_argument("--image", metavar="FILE", help="the first frame: image to video")
    flags.add_argument("--video", metavar="FILE", help="a clip to go on from: its frames, then the new ones")
    flags.add_argument("--baseline", action="store_true", help="the text-only DiT, without the AR's tokens")
    arguments = flags.parse_args()
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise InputError("--prompt: empty; expected a description of the video")
    if arguments.image and arguments.video:
        raise InputError("--image and --video exclude each other: a video starts from one of them")
    path = Path(arguments.output).expanduser().absolute()
    check_output(path)
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    check_prompts(arguments.prompt, bundle.config)
    try:
        options = default_options(
            bundle.config.sampling,
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            token_guidance_scale=arguments.token_guidance_scale,
            baseline=arguments.baseline or None,
        )
        segments = arguments.segments if arguments.segments is not None else len(arguments.prompt)
        prompts = spread_prompts(arguments.prompt, segments)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{str(first['loc'][0]).replace('_', '-')}={first['input']}: {first['msg']}") from None
    except ValueError as error:
        raise InputError(f"--segments: {error}") from None
    if not bundle.guided and not options.baseline:
        print("this bundle is text-only: rendering without the AR's tokens", file=sys.stderr)
    start = read_start(bundle, arguments.image, arguments.video)
    begin = time.perf_counter()
    frames = make_video(VideoGenerator(bundle), prompts, path, arguments.seed, options, start)
    print(f"{path}: {frames} frames in {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    run(main)
