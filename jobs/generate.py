"""Make a video from a bundle in this process, without Ray: `python jobs/generate.py --bundle DIR --prompt "…"`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from pydantic import ValidationError

from arlon_ray import mirror
from arlon_ray.artifact import fetched, one_line
from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_FRAMES, Config, Solver
from arlon_ray.generation import (
    GenerationOptions,
    Given,
    Project,
    ProjectError,
    SegmentText,
    Timeline,
    VideoGenerator,
    default_options,
    given_clip,
    given_picture,
    same_given,
)
from arlon_ray.generation.video import GrowingVideo, encode_fragment
from arlon_ray.offload import Offload
from data_pipeline.decode import Clip, fit
from data_pipeline.footage import FootageError, read_picture
from jobs.command_line import BOX, InputError, check_bucket, existing, parser, run
from jobs.storyboards import add_flags, read_scenes, segment_texts

#: What an interruption says.
AGAIN = "with --project the same command goes on behind what is finished, without it begins anew"
#: Frames of a clip that goes before the video which are held at a time.
SHOWN_AT_ONCE = 4 * GROUP_FRAMES


@dataclass(frozen=True)
class Ends:
    """What a video starts from and leads up to, and the clips that are shown before and behind it."""

    given: Given | None = None
    before: Clip | None = None
    until: Given | None = None
    after: Clip | None = None


def make_video(
    generator: VideoGenerator,
    texts: Sequence[SegmentText],
    path: Path,
    seed: int,
    options: GenerationOptions,
    ends: Ends | None = None,
    timeline: Timeline | None = None,
    project: Project | None = None,
) -> int:
    """Write the video of one text a segment to `path`; returns its frames. Memory does not grow with its length.

    While it is made, what is done can be watched in `NAME.partial.mp4`. That is what stays if it is interrupted, or the
    disk is full, and the error says so.
    """
    ends, video = ends or Ends(), GrowingVideo(path)
    fps = generator.bundle.config.video.fps
    timeline = timeline or Timeline()
    try:
        for part in ends.before.parts(SHOWN_AT_ONCE) if ends.before else ():
            video.add(encode_fragment(part, fps))
        made = generator.generate(texts, seed, options, ends.given, timeline, project, ends.until)
        for index, part in enumerate(made):
            timeline.timed("file", index, lambda part=part: video.add(encode_fragment(part, fps)))  # type: ignore[misc]
            watch = f"  watch it in {video.partial}" if index == 0 < len(texts) - 1 else ""
            print(f"segment {index + 1}/{len(texts)}  {video.frames} frames{watch}", file=sys.stderr)
        for part in ends.after.parts(SHOWN_AT_ONCE) if ends.after else ():
            video.add(encode_fragment(part, fps))
        video.finish()
    except BaseException:
        if video.fragments:
            print(f"the first {video.frames} frames are kept in {video.partial}", file=sys.stderr)
        if project is not None:
            print(f"{len(project)} of {len(texts)} segments are kept in {project.folder}", file=sys.stderr)
        raise
    return video.frames


def read_ends(bundle: Bundle, image: str | None, video: str | None, until: str | None) -> Ends:
    """--image or --video, and --until, scaled and cut to the bundle's size (and rate).

    Raises InputError for what cannot be used.
    """
    size = (bundle.config.video.height, bundle.config.video.width)
    needed = bundle.config.segment.overlap_groups * GROUP_FRAMES
    before = after = given = lead = None
    if image:
        with _named("--image", image) as path:
            given = given_picture(bundle, fit(read_picture(path)[None], *size)[0])
    if video:
        with _named("--video", video) as path:
            before = Clip(str(path), *size, bundle.config.video.fps)
            count = min(before.frames, needed)
            given = given_clip(bundle, before.read(before.frames - count, count))
    if until:
        with _named("--until", until) as path:
            after = Clip(str(path), *size, bundle.config.video.fps)
            lead = given_clip(bundle, after.read(0, min(after.frames, needed)))
    return Ends(given, before, lead, after)


@contextmanager
def _named(flag: str, text: str) -> Iterator[Path]:
    path = fetched(existing(text, flag))
    try:
        yield path
    except (FootageError, ValueError, RuntimeError, OSError) as error:
        raise InputError(f"{flag} {path}: {one_line(error)}") from None


def device_of(config: Config) -> str:
    """Where the bundle's configuration wants the models: "cpu" or "cuda". Raises InputError if there is no GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("the bundle is configured with device=cuda, but torch finds no GPU here")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def open_bundle(path: Path, offload: Offload = "none") -> Bundle:
    """The bundle, on the device that its own configuration asks for.

    Raises InputError if that is the CPU, and something is to be offloaded.
    """
    bundle = load_bundle(path)
    device = device_of(bundle.config)
    if device == "cpu" and offload != "none":
        raise InputError(
            f"--offload {offload}: frees a GPU's memory, but this bundle computes on the CPU: leave it out"
        )
    return bundle if device == "cpu" else load_bundle(path, device, offload)


def check_output(path: Path) -> None:
    """Raises InputError if no file can be written there. Creates nothing, but for the folder in front of a bucket."""
    if mirror.origin(path):
        check_bucket(path.parent)
    if os.path.isdir(path):
        raise InputError(f"--output {path}: is a folder; expected the name of an mp4")
    above = next(folder for folder in path.parents if os.path.exists(folder))
    if not os.path.isdir(above):
        raise InputError(f"--output {path}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"--output {path}: {above} is not writable")


def project_in(
    folder: str, bundle: Bundle, options: GenerationOptions, ends: Ends, texts: Sequence[SegmentText], seed: int
) -> Project:
    """A new project, or the one there if its segments are the first ones of this very video.

    Raises InputError if they are another's, or the folder cannot be made.
    """
    path = Path(folder).expanduser().absolute()
    try:
        if not Project.is_in(path):
            return Project.create(path, bundle.fingerprint, options, ends.given, ends.until)
        project = Project.open(path, bundle.fingerprint)
        ends_alike = same_given(project.start, ends.given) and same_given(project.until, ends.until)
        if project.options != options or not ends_alike or not project.begins(texts, seed):
            raise InputError(
                f"--project {path}: there is a project already, of another video (texts, seed, settings, --image, "
                "--video or --until; or it was edited); choose another folder, or change that video with jobs/edit.py"
            )
        if damaged := project.drop_damaged():
            print(f"{path}: segment {len(project)} cannot be read: {damaged} segments are made again", file=sys.stderr)
    except (ProjectError, OSError) as error:
        raise InputError(f"--project {one_line(error)}") from None
    print(f"{len(project)} of {len(texts)} segments are there already: going on behind them", file=sys.stderr)
    return project


def main() -> None:
    """Command line."""
    flags = parser("Make a video from a bundle, without Ray.", output="video.mp4", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR", help="model bundle (default: weights/tiny)")
    add_flags(flags)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--steps", type=int, help="denoising steps")
    flags.add_argument("--solver", choices=get_args(Solver), help="how a step is taken")
    flags.add_argument("--guidance-scale", type=float)
    flags.add_argument("--token-guidance-scale", type=float)
    flags.add_argument("--image", metavar="FILE", help="the first frame: image to video")
    flags.add_argument("--video", metavar="FILE", help="a clip to go on from: its frames, then the new ones")
    flags.add_argument("--until", metavar="FILE", help="a clip to lead up to: shown behind the new frames")
    flags.add_argument("--baseline", action="store_true", help="the text-only DiT, without the AR's tokens")
    flags.add_argument(
        "--project",
        metavar="DIR",
        help="keep what each segment was made of: the same command goes on after an interruption, jobs/edit.py changes "
        "the video",
    )
    flags.add_argument(
        "--offload",
        choices=get_args(Offload),
        default="none",
        help="for a small GPU: text: the text encoder computes on the CPU; idle: parts are on the GPU only while they "
        "work; all: both",
    )
    flags.add_argument("--trace", metavar="FILE", help="write who worked when, for ui.perfetto.dev")
    arguments = flags.parse_args()
    if arguments.image and arguments.video:
        raise InputError("--image and --video exclude each other: a video starts from one of them")
    scenes = read_scenes(arguments)
    path = mirror.local(arguments.output).expanduser().absolute()
    check_output(path)
    bundle = open_bundle(existing(arguments.bundle, "--bundle"), arguments.offload)
    texts = segment_texts(arguments, scenes, bundle.config)
    try:
        options = default_options(
            bundle.config.sampling,
            steps=arguments.steps,
            solver=arguments.solver,
            guidance_scale=arguments.guidance_scale,
            token_guidance_scale=arguments.token_guidance_scale,
            baseline=arguments.baseline or None,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{str(first['loc'][0]).replace('_', '-')}={first['input']}: {first['msg']}") from None
    if not bundle.guided and not options.baseline:
        print("this bundle is text-only: rendering without the AR's tokens", file=sys.stderr)
    ends = read_ends(bundle, arguments.image, arguments.video, arguments.until)
    generator, timeline = VideoGenerator(bundle), Timeline()
    project = None
    if arguments.project:
        project = project_in(arguments.project, bundle, options, ends, texts, arguments.seed)
        ends = replace(ends, given=project.start, until=project.until)
    try:
        frames = make_video(generator, texts, path, arguments.seed, options, ends, timeline, project)
    except ProjectError as error:
        raise InputError(f"--project {error}") from None
    if arguments.trace:
        timeline.write(Path(arguments.trace))
    seconds = time.perf_counter() - timeline.begin
    mirror.push(path)
    print(f"{mirror.named(str(path))}: {frames} frames ({frames / bundle.config.video.fps:.4g} s) in {seconds:.1f} s")


if __name__ == "__main__":
    run(main, again=AGAIN)
