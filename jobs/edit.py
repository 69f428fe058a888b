"""Change a video that was made with `jobs/generate.py --project DIR`, and write it anew.

`python jobs/edit.py --project DIR --segment 3 --seed 7 [--prompt "…"] --output video.mp4` makes one segment again, held
to its neighbours; `python jobs/edit.py --project DIR --prompt "…" --segments 4 --output video.mp4` adds segments at the
end. All else stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from arlon_ray.generation import Project, ProjectError, Scene, VideoEditor, VideoGenerator
from jobs.command_line import BOX, InputError, existing, parser, run
from jobs.generate import Ends, check_output, make_video, open_bundle
from jobs.storyboards import add_flags, read_scenes, segment_texts

#: What an interruption says.
AGAIN = "the project keeps what is finished"


def one_scene(arguments: argparse.Namespace) -> list[Scene]:
    """What the one segment that is made again is about; nothing: what it is about already."""
    if (
        arguments.storyboard
        or arguments.seconds
        or arguments.segments is not None
        or arguments.transition
        or arguments.cut
    ):
        raise InputError("--segment makes one segment again: of the texts only --prompt goes with it")
    if not arguments.prompt:
        return []
    if len(arguments.prompt) > 1:
        raise InputError(f"--segment makes one segment again: expected one --prompt, not {len(arguments.prompt)}")
    return read_scenes(arguments)


def reroll(editor: VideoEditor, segment: int, seed: int, scenes: Sequence[Scene]) -> None:
    """Make a segment again. Raises InputError if it is not there."""
    try:
        editor.reroll(segment, seed, scenes[0].prompt if scenes else None)
    except ProjectError:
        raise
    except ValueError as error:
        raise InputError(f"--segment: {error}") from None


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="video.mp4", config=False)
    flags.add_argument(
        "--bundle", default=str(BOX), metavar="DIR", help="the bundle that made it (default: weights/tiny)"
    )
    flags.add_argument("--project", required=True, metavar="DIR", help="what `generate.py --project` kept")
    flags.add_argument("--segment", type=int, metavar="K", help="make this segment again (the first is 0)")
    flags.add_argument("--seed", type=int, default=0)
    add_flags(flags)
    arguments = flags.parse_args()
    scenes = read_scenes(arguments) if arguments.segment is None else one_scene(arguments)
    path = Path(arguments.output).expanduser().absolute()
    check_output(path)
    folder = existing(arguments.project, "--project")
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    try:
        project = Project.open(folder, bundle.fingerprint)
    except ProjectError as error:
        raise InputError(f"--project {error}") from None
    generator, added = VideoGenerator(bundle), []
    try:
        if arguments.segment is None:
            added = segment_texts(arguments, scenes, bundle.config, len(project))
        else:
            reroll(VideoEditor(generator, project), arguments.segment, arguments.seed, scenes)
        texts = [*project.texts(), *added]
        ends = Ends(project.start)
        frames = make_video(generator, texts, path, arguments.seed, project.options, ends, project=project)
    except ProjectError as error:
        raise InputError(f"--project {error}") from None
    print(f"{path}: {frames} frames, {len(project)} segments")


if __name__ == "__main__":
    run(main, again=AGAIN)
