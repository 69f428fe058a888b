"""Measure a bundle on held-out captions: each row (a model and how it samples) a table line and an MLflow run.

`python jobs/evaluate.py --bundle DIR --rows text-only@30 guided@5 true-tokens@5 truth`
`… --tune guidance_scale=1,2,3,4` finds each row's best value on other captions first.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arlon_ray import __version__
from arlon_ray.artifact import one_line, sha256_of, write_json
from arlon_ray.bundle import MANIFEST, Bundle
from arlon_ray.config import GROUP_FRAMES
from arlon_ray.evaluation.cost import weights, work
from arlon_ray.evaluation.metrics import summary
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.evaluation.tokens import caption_nats, guide_errors, token_figures
from arlon_ray.generation import default_options
from arlon_ray.generation.video import contact_sheet, write_video
from data_pipeline.manifest import settings_key
from data_pipeline.worlds import Scene, caption, exchanged, turned
from jobs.command_line import BOX, InputError, existing, output_folder, parser, run
from jobs.evaluation import (
    FORM,
    Evaluator,
    Prompt,
    Row,
    RowResult,
    held_out_prompts,
    parse_row,
    read_prompts,
    sampling_options,
    table_of,
)
from jobs.generate import open_bundle
from jobs.results_page import VIDEOS, read_results, write_page
from jobs.tables import costs_table
from jobs.tracking import Tracking

DEFAULT_ROWS = ("truth", "text-only@30", "text-only@5", "guided@5", "true-tokens@5")
STRIPS, STRIP_FRAMES = 6, 8
LONGEST_NAME = 220  # bytes of a file's name, without its number and endings
#: What a video of the failure gallery got wrong.
MEANT = ("object_class", "colour", "multiple_objects", "spatial_relationship", "action")


class Gallery:
    """Pictures of a row: its first videos, and those that show something else than they should."""

    def __init__(self) -> None:
        self.first: list[Frames] = []
        self.failed: list[Frames] = []
        self.captions: list[str] = []

    def add(self, index: int, prompt: Prompt, frames: Frames, values: Mapping[str, float]) -> None:
        """Take in one video."""
        strip = frames[np.linspace(0, len(frames) - 1, STRIP_FRAMES).round().astype(int)]
        if index < STRIPS:
            self.first.append(strip)
        wrong = [name for name in MEANT if values.get(name) == 0.0]
        if wrong and len(self.failed) < STRIPS:
            self.failed.append(strip)
            self.captions.append(f"{prompt.text} ({', '.join(wrong)})")

    def write(self, folder: Path, row: Row) -> list[Path]:
        """`<row>.png`, and `<row>-failures.png` where there are any."""
        written = []
        for strips, name in ((self.first, row.file_name), (self.failed, f"{row.file_name}-failures")):
            if strips:
                path = folder / f"{name}.png"
                contact_sheet(path, np.concatenate(strips), columns=STRIP_FRAMES, limit=STRIPS * STRIP_FRAMES)
                written.append(path)
        return written


def evaluate(
    evaluator: Evaluator,
    rows: Sequence[Row],
    output: Path,
    *,
    label: str = "evaluate",
    vbench: Path | None = None,
    tracking: Tracking | None = None,
) -> list[RowResult]:
    """Measure all rows, each an MLflow run: results.json, results.md and pictures of each row in `output`."""
    bundle, prompts, results = evaluator.bundle, evaluator.prompts, []
    tracking = tracking or Tracking(bundle.config, output)
    made, texts = made_of(evaluator), [prompt.text for prompt in prompts]
    bundle_key, parents = made["bundle"], made["parts"]
    tags = {"bundle": bundle_key, "captions": str(len(prompts)), "seed": str(evaluator.seed)}
    for row in rows:
        gallery, names = Gallery(), Counter[str]()

        def keep(
            index: int,
            frames: Frames,
            values: dict[str, float],
            row: Row = row,
            gallery: Gallery = gallery,
            names: Counter[str] = names,
        ) -> None:
            gallery.add(index, prompts[index], frames, values)
            if vbench is not None:
                # VBench's layout: a folder for each model, "<prompt>-<number>.mp4"
                stem = prompts[index].text.replace("/", " ").encode()[:LONGEST_NAME].decode(errors="ignore")
                write_video(vbench / row.file_name / f"{stem}-{names[stem]}.mp4", frames, bundle.config.video.fps)
                names[stem] += 1

        settings = {"bundle": bundle_key, "row": row.name, "options": dict(row.changes), "prompts": texts}
        with tracking.row(
            f"{label} {row.name}",
            key=settings_key({**settings, "seed": evaluator.seed}),
            options=evaluator.options(row),
            tags={**tags, "row": row.name},
            parents=parents,
        ) as tracked:
            result = evaluator.row(row, keep)
            tracked.metrics(0, figures_of(result))
            for path in gallery.write(output, row):
                tracked.file(path)
        results.append(result)
        for failed, error in result.failures.items():
            print(f"{row.name}: video {failed}: {error}", file=sys.stderr)
        write_results(output, evaluator, results)
        if gallery.captions:
            (output / f"{row.file_name}-failures.txt").write_text("\n".join(gallery.captions) + "\n")
    return results


def figures_of(result: RowResult) -> dict[str, float]:
    """What MLflow shows of a row: means with the ends of their 95 % intervals, seconds, and videos that failed."""
    figures = {"videos": float(len(result.metrics)), "failures": float(len(result.failures))}
    for name, value in summary(list(result.metrics.values())).items():
        figures |= {name: value["mean"], f"{name}/low": value["low"], f"{name}/high": value["high"]}
    if result.seconds is not None:
        figures["seconds_per_video"] = result.seconds
    if result.distance is not None:
        figures["frechet_video_distance"] = result.distance
    return figures


def write_results(output: Path, evaluator: Evaluator, results: Sequence[RowResult], **more: Any) -> None:
    """results.json and results.md as far as they are, and each video's values in videos.json."""
    rows = {result.row.name: result.report() for result in results}
    found = {"prompts": len(evaluator.prompts), "rows": rows, "made_of": made_of(evaluator), **more}
    write_json(output / "results.json", found)
    (output / VIDEOS).write_text(json.dumps(evaluator.values(results), separators=(",", ":")) + "\n")
    (output / "results.md").write_text(table_of(results) + "\n")


def made_of(evaluator: Evaluator) -> dict[str, Any]:
    """What its figures depend on: the bundle and its parts, how it is run, and versions."""
    bundle = evaluator.bundle
    return {
        "bundle": sha256_of(bundle.path / MANIFEST),
        "parts": {role: artifact.fingerprint for role, artifact in bundle.artifacts.items()},
        "seed": evaluator.seed, "segments": evaluator.segments, "code_version": __version__,
        "torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(bundle.device),
    }  # fmt: skip


def beside(evaluator: Evaluator, *works: Callable[[Evaluator], dict[str, Any]]) -> dict[str, Any]:
    """What is measured beside the rows; what fails is said, listed under `failures`, and the rest goes on."""
    found: dict[str, Any] = {}
    for work_of in works:
        try:
            found |= work_of(evaluator)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            what = work_of.__name__
            found.setdefault("failures", {})[what] = one_line(error)
            print(f"{what}: {one_line(error)}", file=sys.stderr)
    return found


def tuned(
    bundle: Bundle, rows: Sequence[Row], choices: Mapping[str, Sequence[Any]], count: int, seed: int
) -> tuple[list[Row], dict[str, Any]]:
    """Each model and number of steps at its own best options, found on captions of their own; and all scores.

    Rows that differ from an earlier one in other options alone take over its choice: what differs is then the option.
    """
    if not choices:
        return list(rows), {}
    evaluator = Evaluator(bundle, held_out_prompts(bundle, count, "tune"), seed)
    best: dict[tuple[str, Any], dict[str, Any]] = {}
    scores: dict[str, Any] = {}
    for row in rows:
        key = (row.model, row.changes.get("steps"))
        if key not in best:
            absent = not bundle.guided and row.model != "text-only"
            best[key], scores[row.name] = ({}, {}) if absent else evaluator.best(replace(row, again=None), choices)
            told = ", ".join(f"{name}={value:g}{_at_an_end(value, choices[name])}" for name, value in best[key].items())
            print(f"{row.name}: best {told}" if told else f"{row.name}: nothing to choose", flush=True)
    chosen = [row.with_changes(**best[row.model, row.changes.get("steps")]) for row in rows]
    return chosen, {"tuned": {"captions": count, "scores": scores}}


def _at_an_end(value: float, values: Sequence[float]) -> str:
    ends = {min(values): "least", max(values): "largest"} if len(values) > 1 else {}
    return f" (the {ends[value]} of its values: one beyond may be better)" if value in ends else ""


def costs(evaluator: Evaluator) -> dict[str, Any]:
    """Parameters, bytes, operations and memory of each `parts` for one video; of the DiT, for one denoising step.

    Weights of the VAE are those of both its halves, operations and memory those of decoding.
    """
    bundle, generator, text = evaluator.bundle, evaluator.generator, evaluator.prompts[0].text
    parts, device = {"vae, decoding": weights(bundle.vae)}, bundle.device
    step = default_options(bundle.config.sampling, steps=1, guidance_scale=1.0, token_guidance_scale=1.0)
    plain = step.model_copy(update={"baseline": True})
    latents = generator.renderer.render(text, None, None, 0, 0, plain).latents
    parts["vae, decoding"] |= work(lambda: generator.decoder.decode(latents), device)
    parts["dit text-only, a step"] = weights(bundle.baseline) | work(
        lambda: generator.renderer.render(text, None, None, 0, 0, plain), device
    )
    if generator.planner is not None:
        planner = generator.planner
        single = step.model_copy(update={"ar_guidance_scale": 1.0})
        tokens = next(planner.plan([text], 0, single)).tokens
        parts["ar, a segment"] = weights(bundle.ar) | work(lambda: next(planner.plan([text], 0, single)), device)
        parts["dit guided, a step"] = weights(bundle.dit) | work(
            lambda: generator.renderer.render(text, tokens, None, 0, 0, step), device
        )
        codes = torch.from_numpy(tokens)[None].long().to(device)
        parts["codec, its guide of a segment"] = weights(bundle.codec) | work(
            lambda: bundle.codec.decode(codes, bundle.config.latent_grid), device
        )
    return {"parts": parts}


def of_tokens(evaluator: Evaluator) -> dict[str, Any]:
    """Figures of codecs and AR on the true videos, what kind of errors the DiT's guide has, and what chance makes."""
    bundle, texts = evaluator.bundle, [prompt.text for prompt in evaluator.prompts]
    latents = [evaluator.latents(scene) for scene in evaluator.scenes]
    return {
        "tokens": token_figures(bundle, latents, texts) | contrast_nats(evaluator, latents),
        "guide_errors": guide_errors(bundle, latents, texts, evaluator.seed),
        "frechet_chance": evaluator.frechet_chance() if len(texts) > 1 else None,
    }


def contrast_nats(evaluator: Evaluator, latents: Sequence[torch.Tensor]) -> dict[str, float]:
    """What a caption that says the opposite costs the AR (`caption_nats`).

    Of left and right, of up and down, and of which of two related objects is where.
    """

    def goes(*ways: str) -> Callable[[Scene], bool]:
        return lambda scene: scene.shots[0].things[0].direction in ways

    figures = {}
    for name, concerns, opposite in (
        ("left_right", goes("left", "right"), turned),
        ("up_down", goes("up", "down"), turned),
        ("order", lambda scene: scene.shots[0].relation is not None, exchanged),
    ):
        chosen = [i for i, scene in enumerate(evaluator.scenes) if concerns(scene)]
        if chosen:
            texts = [evaluator.prompts[i].text for i in chosen]
            others = [caption(opposite(evaluator.scenes[i])) for i in chosen]
            nats = caption_nats(evaluator.bundle, [latents[i] for i in chosen], texts, others)
            figures[f"ar_nats_{name}"] = float(np.mean(nats))
    return figures


def parse_choices(texts: Sequence[str]) -> dict[str, list[float]]:
    """`--tune NAME=VALUE,VALUE…`. Raises InputError."""
    choices = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            choices[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise InputError(f"--tune {text}: expected OPTION=NUMBER,NUMBER,…") from None
        for value in choices[name]:
            sampling_options(f"--tune {text}", {name: value})
    return choices


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/evaluation", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR", help="model bundle (default: weights/tiny)")
    flags.add_argument("--rows", nargs="+", default=list(DEFAULT_ROWS), metavar="ROW", help=FORM)
    flags.add_argument("--count", type=int, default=64, help="held-out captions (default: 64)")
    flags.add_argument("--prompts", metavar="FILE", help="your own prompts instead, one a line: no readings of meaning")
    flags.add_argument("--segments", type=int, default=1, help="segments of each video, of one prompt (default: 1)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="OPTION=V,V",
        help="values to choose from, on other captions, for each row; repeatable",
    )
    flags.add_argument("--tune-count", type=int, default=64, help="captions to choose on (default: 64)")
    flags.add_argument("--costs", action="store_true", help="also parameters, operations and memory of each part")
    flags.add_argument("--what", metavar="TEXT", help="what this bundle is, for pages that show it beside others")
    flags.add_argument("--docs", metavar="FILE", help="page to write, its pictures in a folder beside it")
    flags.add_argument(
        "--export-vbench",
        metavar="DIR",
        help="also write the videos in the layout of the VBench tool (five of a prompt: give its line five times)",
    )
    arguments = flags.parse_args()
    rows, choices = [parse_row(text) for text in arguments.rows], parse_choices(arguments.tune)
    for name in ("count", "tune_count", "segments"):
        if (value := getattr(arguments, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if too_far := [row.name for row in rows if row.again is not None and row.again >= arguments.segments]:
        raise InputError(f"--rows {too_far[0]}: the videos have segments 0 to {arguments.segments - 1}")
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    if arguments.prompts is not None:
        prompts = read_prompts(existing(arguments.prompts, "--prompts"), bundle)
    else:
        prompts = held_out_prompts(bundle, arguments.count, segments=arguments.segments)
    vbench = Path(arguments.export_vbench).expanduser().absolute() if arguments.export_vbench else None
    output = output_folder(arguments)
    rows, scores = tuned(bundle, rows, choices, arguments.tune_count, arguments.seed)
    evaluator = Evaluator(bundle, prompts, arguments.seed, arguments.segments)
    results = evaluate(evaluator, rows, output, vbench=vbench)
    variant = "bundle" if arguments.segments == 1 else f"bundle, {arguments.segments} segments"
    what = arguments.what or f"the bundle {bundle.path.name}"
    stand_in = "dit_base" not in bundle.artifacts and any(row.model == "text-only" for row in rows)
    remark = "; text-only: its guided DiT without tokens, it has no text-only one" if bundle.guided and stand_in else ""
    more: dict[str, Any] = {"variant": variant, "what": what + remark, **scores}
    works = [costs] if arguments.costs else []
    if bundle.guided and arguments.segments == 1 and all(prompt.scene is not None for prompt in prompts):
        works.append(of_tokens)
    more |= beside(evaluator, *works)
    write_results(output, evaluator, results, **more)
    if arguments.docs:
        page = Path(arguments.docs).expanduser().absolute()
        write_page(page, [read_results(output)], "Written by `jobs/evaluate.py`.")
    frames = bundle.config.segment.groups_of(arguments.segments) * GROUP_FRAMES
    print(f"{len(prompts)} captions, videos of {frames} frames{remark}\n\n{table_of(results)}\n")
    if "tokens" in more:
        print("\n".join(f"{name} {value:.4g}" for name, value in more["tokens"].items()), end="\n\n")
        for name in ("ar", "coarse", "wrong"):
            error = more["guide_errors"][name]
            print(f"guide of {name} tokens: error {error['error']:.3f}, in statistics {error['statistics']:.0%}")
    if "parts" in more:
        print(costs_table(more["parts"]), end="\n\n")
    print(output / "results.json")
    if "failures" in more or any(result.failures for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
