"""Measure long-range memory: does an object that goes away come back as it was, where its caption does not name it?

`python jobs/evaluate_memory.py --bundle DIR --count 32 --sinks 0 1 --output runs/memory` makes videos of held-out
scenes of the returning grade, with each number of groups at the video's beginning that the AR looks back on however
long ago they were (`ar.sink_groups`). It reads the videos, and what the AR's tokens decode to without the DiT.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from arlon_ray.artifact import write_json
from arlon_ray.bundle import Bundle
from arlon_ray.config import override
from arlon_ray.evaluation.memory import GROUPS, return_figures
from arlon_ray.evaluation.metrics import summary
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.generation.video import contact_sheet
from data_pipeline.worlds import Scene, caption, held_out_scenes
from jobs.command_line import BOX, InputError, existing, output_folder, parser, run
from jobs.generate import open_bundle
from jobs.tables import figures_table

PICTURED = 8


def unnamed_scenes(bundle: Bundle) -> Iterator[Scene]:
    """Held-out scenes whose caption does not say what it is that returns."""
    config = override(bundle.config, ["data.sample_grade=returning"])
    scenes = held_out_scenes(config, "measure")
    return (scene for scene in scenes if scene.shots[0].things[0].colour not in caption(scene))


def measure(bundle: Bundle, count: int, sink: int, output: Path) -> dict[str, list[dict[str, float]]]:
    """Figures of so many videos, and of what their tokens alone decode to; the first few are pictured."""
    bundle.ar.config = bundle.ar.config.model_copy(update={"sink_groups": sink})
    generator, segment = VideoGenerator(bundle), bundle.config.segment
    segments = next(number for number in range(1, GROUPS + 1) if segment.groups_of(number) >= GROUPS)
    options = default_options(bundle.config.sampling)
    rows: dict[str, list[dict[str, float]]] = {"video": [], "tokens": []}
    for number, scene in zip(range(count), unnamed_scenes(bundle), strict=False):
        prompts = [caption(scene)] * segments
        frames = np.concatenate(list(generator.generate(prompts, number, options)))
        planned = tokens_alone(generator, prompts, number)
        for name, found in (("video", frames), ("tokens", planned)):
            rows[name].append(return_figures(found))
            if number < PICTURED:
                contact_sheet(output / f"sink{sink}-{name}-{number}.png", found, columns=14, limit=28)
    return rows


def tokens_alone(generator: VideoGenerator, prompts: list[str], seed: int) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of the plan of a whole video, through codec and VAE."""
    bundle, planner = generator.bundle, generator.planner
    assert planner is not None
    options, parts = default_options(bundle.config.sampling), list[np.ndarray]()
    for plan in planner.plan(prompts, seed, options):
        new = plan.tokens[planner.overlap_frames(plan.index) :]
        latents = bundle.codec.decode(torch.from_numpy(new)[None].long().to(bundle.device), bundle.config.latent_grid)
        parts.append(generator.decoder.decode(latents[0].float().cpu().numpy()))
    return np.concatenate(parts)


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/memory", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR", help="guided bundle (default: weights/tiny)")
    flags.add_argument("--count", type=int, default=32, help="videos (default: 32)")
    flags.add_argument("--sinks", type=int, nargs="+", help="ar.sink_groups to compare (default: 0 and the AR's own)")
    arguments = flags.parse_args()
    if arguments.count < 1:
        raise InputError("--count: expected 1 or more")
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    if not bundle.guided:
        raise InputError(f"--bundle {arguments.bundle}: is text-only: without an AR there is no memory to measure")
    sinks = sorted(set(arguments.sinks or [0, bundle.ar.config.sink_groups]))
    if not 0 <= sinks[0] <= sinks[-1] <= bundle.config.segment.groups:
        raise InputError(f"--sinks: expected 0 to {bundle.config.segment.groups}, the groups of a segment")
    output = output_folder(arguments)
    found = {}
    for sink in sinks:
        for name, rows in measure(bundle, arguments.count, sink, output).items():
            found[f"{name}, sink {sink}"] = summary(rows)
    write_json(output / "memory.json", found)
    print(figures_table(found, "what is read, and groups of the beginning that the AR keeps"))
    print(output / "memory.json")


if __name__ == "__main__":
    run(main)
