"""Measure a bundle on held-out captions: each row (a model and its steps) a table line and an MLflow run.

`python jobs/evaluate.py --bundle DIR --rows text-only@30 guided@5 true-tokens@5 truth`
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arlon_ray.artifact import sha256_of, write_json
from arlon_ray.bundle import MANIFEST, Bundle
from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.metrics import measure, summary
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.generation import GenerationOptions, VideoGenerator, default_options
from arlon_ray.generation.video import contact_sheet, write_video
from arlon_ray.models.text import load_token_counter
from arlon_ray.training.stages.vae import to_frames, to_video
from data_pipeline.manifest import settings_key
from data_pipeline.synthetic import Scene, caption, render, sample_scene
from jobs.command_line import InputError, existing, output_folder, parser, run
from jobs.generate import open_bundle
from jobs.tracking import Tracking

#: Scenes of this seed are none that the pipeline renders for training.
HELD_OUT_SEED = 7
DEFAULT_ROWS = ("text-only@30", "text-only@5", "guided@5", "true-tokens@5", "truth")
ROW = re.compile(r"(text-only|guided|true-tokens)@([1-9]\d{0,2})|truth|vae")
STRIPS, STRIP_FRAMES = 6, 8


@dataclass(frozen=True)
class Prompt:
    """What to make; `scene` is its truth, where it has one."""

    text: str
    scene: Scene | None = None


@dataclass
class RowResult:
    """Metrics of one row's videos, and what went wrong."""

    name: str
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    absent: str | None = None

    def report(self) -> dict[str, Any]:
        """For results.json."""
        if self.absent:
            return {"absent": self.absent}
        figures = summary(self.metrics) if self.metrics else {}
        median = float(np.median(self.seconds)) if self.seconds else None
        return {"videos": len(self.metrics), "seconds": median, "failures": self.failures, "metrics": figures}


def held_out_prompts(bundle: Bundle, count: int) -> list[Prompt]:
    """Captions of rendered scenes that no training has seen, of the length of a segment."""
    video, groups = bundle.config.video, bundle.config.segment.groups
    seeds = (HELD_OUT_SEED * 1_000_003 + i for i in range(count))
    scenes = [sample_scene(seed, (groups,), video.height, video.width) for seed in seeds]
    return [Prompt(caption(scene), scene) for scene in scenes]


def read_prompts(path: Path, bundle: Bundle) -> list[Prompt]:
    """One prompt a line. Raises InputError that names the lines that are empty or too long."""
    lines = path.read_text().splitlines()
    count_tokens, limit = load_token_counter(bundle.config.text), bundle.config.text.max_tokens
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"--prompts {path}: line {number} is empty")
        if (tokens := count_tokens(line)) > limit:
            raise InputError(f"--prompts {path}: line {number} has {tokens} tokens, at most {limit}")
    if not lines:
        raise InputError(f"--prompts {path}: no prompt in it")
    return [Prompt(line.strip()) for line in lines]


class Evaluator:
    """Makes and measures the videos of rows."""

    def __init__(self, bundle: Bundle, prompts: list[Prompt], seed: int) -> None:
        self.bundle, self.prompts, self.seed = bundle, prompts, seed
        self.generator = VideoGenerator(bundle)

    def row(self, name: str, on_video: Callable[[int, Frames], None]) -> RowResult:
        """Measure the row `name`; `on_video(i, frames)` sees every video. One that fails is named, the rest goes on."""
        result = RowResult(name)
        if not self.bundle.guided and name.startswith(("guided", "true-tokens")):
            result.absent = "the bundle has no AR"
            return result
        if any(prompt.scene is None for prompt in self.prompts) and name.startswith(("true-tokens", "truth", "vae")):
            result.absent = "these prompts have no ground truth"
            return result
        for index, prompt in enumerate(self.prompts):
            begin = time.perf_counter()
            try:
                frames = self.make(name, index, prompt)
                result.seconds.append(time.perf_counter() - begin)
                result.metrics.append(measure(frames, prompt.scene, self.bundle.config.video.fps))
                on_video(index, frames)
            except (ValueError, RuntimeError) as error:
                result.failures[f"{index}: {prompt.text}"] = " ".join(str(error).split())[:300]
            if sys.stderr.isatty():
                print(f"\r{name}  {index + 1}/{len(self.prompts)}", end="", file=sys.stderr, flush=True)
        return result

    def make(self, name: str, index: int, prompt: Prompt) -> Frames:
        """The video of one row and prompt. Raises ValueError for latents that are no numbers."""
        model, _, steps = name.partition("@")
        if model == "truth":
            assert prompt.scene is not None
            return render(prompt.scene)
        if model == "vae":
            assert prompt.scene is not None
            return to_frames(self.bundle.vae.decode(self._true_latents(prompt.scene)))[0]
        options = default_options(self.bundle.config.sampling, steps=int(steps))
        options = options.model_copy(update={"baseline": model == "text-only"})
        if model == "true-tokens":
            assert prompt.scene is not None
            return self._from_true_tokens(prompt.scene, prompt.text, index, options)
        return next(self.generator.generate([prompt.text], self.seed + index, options))

    def _true_latents(self, scene: Scene) -> torch.Tensor:
        return self.bundle.vae.encode(to_video(render(scene)[None]).to(self.bundle.device))

    def _from_true_tokens(self, scene: Scene, text: str, index: int, options: GenerationOptions) -> Frames:
        tokens = self.bundle.codec.encode(self._true_latents(scene))[0].int().cpu().numpy()
        rendered = self.generator.renderer.render(text, tokens, None, self.seed + index, 0, options)
        return self.generator.decoder.decode(rendered.latents)


def table(results: list[RowResult]) -> str:
    """The results as a Markdown table: means, and half the width of the 95 % interval."""
    names = next((list(result.metrics[0]) for result in results if result.metrics), [])
    lines = [f"| row | videos | s/video | {' | '.join(names)} |", f"|---|{'---|' * (len(names) + 2)}"]
    for result in results:
        report = result.report()
        if result.absent:
            lines.append(f"| {result.name} | absent: {result.absent} |{' |' * (len(names) + 1)}")
            continue
        cells = [
            f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.3f}" for value in report["metrics"].values()
        ]
        lines.append(f"| {result.name} | {report['videos']} | {report['seconds']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluate(
    bundle: Bundle, prompts: list[Prompt], rows: list[str], output: Path, seed: int, vbench: Path | None
) -> list[RowResult]:
    """Measure all rows: results.json, results.md and a strip of pictures for each row in `output`."""
    evaluator, tracking, results = Evaluator(bundle, prompts, seed), Tracking(bundle.config, output), []
    bundle_key = sha256_of(bundle.path / MANIFEST)
    for name in rows:
        strips: list[Frames] = []

        def keep(index: int, frames: Frames, strips: list[Frames] = strips, name: str = name) -> None:
            if index < STRIPS:
                strips.append(frames[np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)])
            if vbench is not None:
                # VBench's layout: a folder for each model, "<prompt>-<number>.mp4"
                stem = prompts[index].text.replace("/", " ").rstrip(".")[:180]
                write_video(vbench / name.replace("@", "-") / f"{stem}-0.mp4", frames, bundle.config.video.fps)

        key = settings_key({"bundle": bundle_key, "row": name, "prompts": [p.text for p in prompts], "seed": seed})
        with tracking.pipeline(f"evaluate {name}", key=key) as tracked:
            result = evaluator.row(name, keep)
            if result.metrics:
                tracked.metrics(0, {metric: value["mean"] for metric, value in summary(result.metrics).items()})
                tracked.metrics(0, {"seconds_per_video": float(np.median(result.seconds))})
            if strips:
                path = output / f"{name.replace('@', '-')}.png"
                contact_sheet(path, np.concatenate(strips), columns=STRIP_FRAMES, limit=STRIPS * STRIP_FRAMES)
        results.append(result)
        for failed, error in result.failures.items():
            print(f"{name}: video {failed}: {error}", file=sys.stderr)
        write_json(output / "results.json", {r.name: r.report() for r in results})
        (output / "results.md").write_text(table(results) + "\n")
    return results


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/evaluation", config=False)
    flags.add_argument("--bundle", required=True, metavar="DIR", help="model bundle")
    flags.add_argument("--rows", nargs="+", default=list(DEFAULT_ROWS), metavar="ROW",
                       help="text-only@STEPS, guided@STEPS, true-tokens@STEPS, vae, truth")  # fmt: skip
    flags.add_argument("--count", type=int, default=64, help="held-out captions (default: 64)")
    flags.add_argument("--prompts", metavar="FILE", help="your own prompts instead, one a line: no readings of meaning")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--export-vbench", metavar="DIR", help="also write the videos in the layout of the VBench tool")
    arguments = flags.parse_args()
    for row in arguments.rows:
        if not ROW.fullmatch(row):
            raise InputError(f"--rows {row}: expected text-only@N, guided@N, true-tokens@N (N steps), vae or truth")
    if arguments.count < 1:
        raise InputError(f"--count {arguments.count}: expected 1 or more")
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    if arguments.prompts is not None:
        prompts = read_prompts(existing(arguments.prompts, "--prompts"), bundle)
    else:
        prompts = held_out_prompts(bundle, arguments.count)
    vbench = Path(arguments.export_vbench).expanduser().absolute() if arguments.export_vbench else None
    output = output_folder(arguments)
    results = evaluate(bundle, prompts, arguments.rows, output, arguments.seed, vbench)
    frames = bundle.config.segment.groups * GROUP_FRAMES
    print(f"{len(prompts)} captions, videos of {frames} frames\n\n{table(results)}\n\n{output / 'results.json'}")
    if any(result.failures for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
