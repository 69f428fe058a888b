"""Measure progressive prompts on rendered captions: is each part what its prompt says, how soon does a change show?

`python jobs/evaluate_changes.py --bundle DIR --count 16 --seconds 4 --output runs/changes` makes videos of two prompts
of so many seconds each, once with every direction reversed in the second prompt, once with another scene in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.artifact import write_json
from arlon_ray.bundle import Bundle
from arlon_ray.evaluation.changes import change_figures
from arlon_ray.evaluation.metrics import summary
from arlon_ray.generation import GenerationOptions, VideoGenerator, default_options, storyboard
from arlon_ray.generation import Scene as Part
from arlon_ray.generation.storyboard import first_of_shot
from arlon_ray.generation.video import contact_sheet
from data_pipeline.worlds import Scene, caption, held_out_scenes, turned
from jobs.command_line import BOX, InputError, existing, output_folder, parser, run
from jobs.evaluation import sampling_options
from jobs.generate import open_bundle
from jobs.tables import figures_table

KINDS = ("direction", "scene")
PICTURED = 4


def pairs(bundle: Bundle, kind: str, count: int) -> list[tuple[Scene, Scene]]:
    """What comes before the change, and after it."""
    scenes = held_out_scenes(bundle.config, "measure")
    if kind == "scene":
        return [(next(scenes), next(scenes)) for _ in range(count)]
    moving = (scene for scene in scenes if any(thing.direction != "still" for thing in scene.shots[0].things))
    return [(scene, turned(scene)) for scene, _ in zip(moving, range(count), strict=False)]


def measure_kind(
    generator: VideoGenerator,
    kind: str,
    count: int,
    seconds: float,
    transition: int,
    cut: bool,
    options: GenerationOptions,
    output: Path,
) -> list[dict[str, float]]:
    """Figures of every video of one kind of change; the first few are pictured."""
    config, rows = generator.bundle.config, []
    for number, (before, after) in enumerate(pairs(generator.bundle, kind, count)):
        parts = [Part(caption(before), seconds), Part(caption(after), seconds, cut)]
        texts = storyboard(parts, config, transition=transition)
        made = list(generator.generate(texts, number, options))
        change = (
            sum(map(len, made[: first_of_shot(texts, len(texts) - 1)])) if cut else round(seconds * config.video.fps)
        )
        frames = np.concatenate(made)
        rows.append(change_figures(frames, change, before.shots[0], after.shots[0]))
        if number < PICTURED:
            contact_sheet(output / f"{kind}-{number}.png", frames, columns=16, limit=32)
    return rows


def report(results: dict[str, Sequence[dict[str, float]]]) -> dict[str, Any]:
    """Mean and interval of every figure, by kind of change."""
    return {kind: summary(rows) for kind, rows in results.items()}


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/changes", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR", help="guided bundle (default: weights/tiny)")
    flags.add_argument("--count", type=int, default=16, help="videos of each kind (default: 16)")
    flags.add_argument("--seconds", type=float, default=4.0, help="of each of the two prompts (default: 4)")
    flags.add_argument("--transition", type=int, default=0, help="latent frames over which texts are blended")
    flags.add_argument("--cut", action="store_true", help="the second prompt begins a new shot")
    flags.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of sampling, repeatable: ar_contrast=false"
    )
    arguments = flags.parse_args()
    if arguments.count < 1 or arguments.transition < 0:
        raise InputError("--count: expected 1 or more, --transition 0 or more")
    if not 2 <= arguments.seconds <= 600:
        raise InputError(f"--seconds {arguments.seconds:g}: expected 2 to 600, so that both parts can be read")
    named = dict(text.partition("=")[::2] for text in arguments.option)
    changed = sampling_options("--option", named)
    output = output_folder(arguments)
    generator = VideoGenerator(open_bundle(existing(arguments.bundle, "--bundle")))
    options = default_options(generator.bundle.config.sampling, **changed)
    results: dict[str, Sequence[dict[str, float]]] = {}
    for kind in KINDS:
        results[kind] = measure_kind(
            generator, kind, arguments.count, arguments.seconds, arguments.transition, arguments.cut, options, output
        )
    found = report(results)
    settings = {
        "seconds": arguments.seconds, "transition": arguments.transition, "cut": arguments.cut, "options": changed
    }  # fmt: skip
    write_json(output / "changes.json", {**settings, **found})
    print(figures_table(found, "change"))
    print(output / "changes.json")


if __name__ == "__main__":
    run(main)
