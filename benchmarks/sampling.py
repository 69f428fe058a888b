"""Ways to sample in fewer evaluations, each measured against 30 steps of Euler: quality, error of the latents, time.

`python -m benchmarks.sampling --bundle weights/tiny --count 64`; rows are those of jobs/evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.bundle import load_bundle
from arlon_ray.evaluation.frechet import frechet_distance
from arlon_ray.evaluation.metrics import bootstrap
from arlon_ray.generation import GenerationOptions, default_options
from benchmarks.machine import in_turns, machine
from jobs.evaluation import Evaluator, Row, RowResult, held_out_prompts, parse_row

#: Each model as it is compared: the guided one at the bundle's own guidance, text-only at its best (docs/results.md).
MODELS = {"guided": "", "text-only": ":guidance_scale=4"}
BASE = "30"
#: Steps and options, behind `MODEL@`. The first is what the others are compared with.
WAYS = (
    BASE, "10", "8", "6", "5",
    "10:solver=ab2", "8:solver=ab2", "6:solver=ab2", "10:solver=dpm2m", "6:solver=dpm2m",
    "5:solver=midpoint", "5:solver=heun",
    "8:time_shift=0.2", "6:solver=ab2:time_shift=0.2", "4:solver=ab2:time_shift=0.2",
    "30:guidance_low=0.7", "30:guidance_high=0.95", "10:solver=ab2:guidance_low=0.7",
    "30:cache_layers=1", "30:cache_layers=2:cache_every=3", "10:solver=ab2:cache_layers=1",
)  # fmt: skip
#: Evaluations of the reference that errors of latents are measured against, and on how many captions.
REFERENCE, COMPARED = 200, 8
DRAWS = 200
#: What motion there is, is neither good nor bad.
NEUTRAL = ("dynamic_degree",)


class Rendered:
    """The latents of the first captions under any options of one model; the plans of guided ones are made once."""

    def __init__(self, evaluator: Evaluator, row: Row) -> None:
        self.evaluator, self.text_only = evaluator, row.model == "text-only"
        self.sampling = default_options(evaluator.bundle.config.sampling, **row.changes)
        self.prompts = evaluator.prompts[:COMPARED]
        planner, self.tokens = evaluator.generator.planner, list[np.ndarray | None]([None] * len(self.prompts))
        if not self.text_only and planner is not None:
            plans = (planner.plan([p.text], evaluator.seed + i, self.sampling) for i, p in enumerate(self.prompts))
            self.tokens = [next(plan).tokens for plan in plans]

    def options(self, row: Row) -> GenerationOptions:
        """Of a row."""
        return default_options(self.sampling, **row.changes).model_copy(update={"baseline": self.text_only})

    def latents(self, options: GenerationOptions, index: int) -> np.ndarray:
        """The first segment of a caption."""
        text, seed = self.prompts[index].text, self.evaluator.seed + index
        return self.evaluator.generator.renderer.render(text, self.tokens[index], None, seed, 0, options).latents

    def reference(self) -> list[np.ndarray]:
        """What many small steps lead to."""
        exact = self.sampling.model_copy(update={"solver": "ab2", "steps": REFERENCE, "baseline": self.text_only})
        return [self.latents(exact, index) for index in range(len(self.prompts))]

    def error(self, row: Row, reference: Sequence[np.ndarray]) -> float:
        """Mean relative distance from it."""
        found = [self.latents(self.options(row), index) for index in range(len(reference))]
        return float(
            np.mean([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, reference, strict=True)])
        )

    def work(self, row: Row) -> int:
        """Rows that go through blocks of the DiT for a segment: branches, evaluations and layers, each counted."""
        generator = self.evaluator.generator
        dit = generator.bundle.baseline if self.text_only else generator.renderer.dit
        with counted([*dit.spatial_blocks, *dit.temporal_blocks]) as rows:
            self.latents(self.options(row), 0)
        return sum(rows)


@contextmanager
def counted(blocks: Sequence[Any]) -> Iterator[list[int]]:
    """Rows of each pass through one of the blocks."""
    rows: list[int] = []
    hooks = [block.register_forward_hook(lambda module, inputs, output: rows.append(len(output))) for block in blocks]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def differences(result: RowResult, base: RowResult, reference: Sequence[np.ndarray]) -> dict[str, Any]:
    """Of every metric, video by video: mean difference from the base, its 95 % interval, and the base's own interval.

    `outside`: metrics whose mean is worse than the base's interval, and the Fréchet distance if it is surely larger.
    """
    common = sorted(result.metrics.keys() & base.metrics.keys())
    found, outside = {}, []
    for name in sorted(set().union(*(base.metrics[i] for i in common))):
        shared = [i for i in common if name in result.metrics[i] and name in base.metrics[i]]
        own, theirs = (np.array([part.metrics[i][name] for i in shared]) for part in (result, base))
        low, high = bootstrap(own - theirs)
        found[name] = {"mean": float((own - theirs).mean()), "low": low, "high": high}
        lowest, highest = bootstrap(theirs)
        if own.mean() < lowest or (name in NEUTRAL and own.mean() > highest):
            outside.append(name)
    if len(result.features) == len(base.features) == len(reference) > 1:
        low, high = _frechet_interval(result.features, base.features, reference)
        found["frechet_video_distance"] = {"low": low, "high": high}
        if low > 0:
            outside.append("frechet_video_distance")
    return {"differences": found, "outside": outside}


def _frechet_interval(own: Sequence[Any], theirs: Sequence[Any], reference: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of how much farther from the reference one is than the other: the videos are drawn anew."""
    random, draws = np.random.default_rng(0), list[float]()
    ours, others, true = (np.array(part) for part in (own, theirs, reference))
    for _ in range(DRAWS):
        chosen = random.integers(0, len(true), len(true))
        far, near = (frechet_distance(part[chosen], true[chosen]) for part in (ours, others))  # type: ignore[arg-type]
        draws.append(far - near)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def measured(evaluator: Evaluator, model: str, ways: Sequence[str], runs: int) -> Iterator[dict[str, Any]]:
    """One model's rows as far as they are."""
    rows = [parse_row(f"{model}@{way}{MODELS[model]}") for way in ways]
    rendered = Rendered(evaluator, rows[0])
    reference, base_work = rendered.reference(), rendered.work(rows[0])
    times = in_turns({row.name: _timed(rendered, row) for row in rows}, runs)
    found: dict[str, Any] = {}
    base: RowResult | None = None
    for row in rows:
        result = evaluator.row(row)
        base = base or result
        found[row.name] = {
            "evaluations": rendered.options(row).evaluations,
            "work": rendered.work(row) / base_work,
            "dit": times[row.name],
            "latent_error": rendered.error(row, reference),
            **result.report(),
            **differences(result, base, evaluator.reference),
        }
        yield found


def _timed(rendered: Rendered, row: Row) -> Callable[[], object]:
    options = rendered.options(row)
    return lambda: rendered.latents(options, 0)


SHOWN = ("object_class", "multiple_objects", "action", "subject_consistency", "imaging_quality")


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: what a row costs, how far its latents are off, how good its videos are."""
    titles = ["row", "evaluations", "work", "times as fast", "latent error", "FVD", *SHOWN, "outside of the base's"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for name, row in found.items():
        fast, distance = row["dit"], row["frechet_video_distance"]
        metrics = [row["metrics"].get(metric) for metric in SHOWN]
        cells = [
            name, str(row["evaluations"]), f"{row['work']:.2f}",
            f"{fast['times_as_fast']:.2f} ({fast['from']:.2f}–{fast['to']:.2f})", f"{row['latent_error']:.3f}",
            "–" if distance is None else f"{distance:.3f}",
            *("–" if value is None else f"{value['mean']:.3f}" for value in metrics),
            ", ".join(row["outside"]) or "–",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--bundle", default=Path("weights/tiny"), type=Path)
    flags.add_argument("--count", type=int, default=64, help="captions; intervals are of these")
    flags.add_argument("--runs", type=int, default=3, help="rounds of timing")
    flags.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    flags.add_argument("--ways", nargs="+", default=list(WAYS), help=f"behind MODEL@; {BASE} comes first")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--output", type=Path, default=Path("benchmarks/results/sampling.json"))
    options = flags.parse_args(arguments)
    bundle = load_bundle(options.bundle)
    evaluator = Evaluator(bundle, held_out_prompts(bundle, options.count), options.seed)
    ways = [BASE, *(way for way in options.ways if way != BASE)]
    result: dict[str, Any] = {
        "machine": machine(),
        "bundle": str(options.bundle),
        "captions": options.count,
        "rows": {},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for rows in measured(evaluator, model, ways, options.runs):
            result["rows"] |= rows
            options.output.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{list(rows)[-1]}", file=sys.stderr, flush=True)
    print(f"{table(result['rows'])}\n\n{options.output}")
    return result


if __name__ == "__main__":
    main()
