"""The rows of an evaluation: which model, how it samples, what its videos measure."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from arlon_ray.artifact import one_line
from arlon_ray.bundle import Bundle
from arlon_ray.config import GROUP_FRAMES, SamplingConfig
from arlon_ray.evaluation.frechet import frechet_distance, video_features
from arlon_ray.evaluation.joins import drift_figures, join_figures
from arlon_ray.evaluation.metrics import DIMENSIONS, measure, summary
from arlon_ray.evaluation.scenes import Frames
from arlon_ray.evaluation.tokens import wrong_tokens
from arlon_ray.generation import (
    GenerationOptions,
    HandOver,
    Project,
    VideoEditor,
    VideoGenerator,
    default_options,
    segment_options,
)
from arlon_ray.models.text import load_token_counter
from arlon_ray.models.vae import to_frames, to_video
from data_pipeline.synthetic import render
from data_pipeline.worlds import HeldOut, Scene, caption, held_out_scenes
from jobs.command_line import InputError
from jobs.tables import results_table

#: Wrong lines of a file of prompts that are named.
MOST_TOLD = 10
ROW = re.compile(r"(?:(text-only|guided|true-tokens)@([1-9]\d{0,2})|(truth|vae))((?::\w+=[\w.]+)*)")
FORM = "text-only@N, guided@N, true-tokens@N (N steps; each may end in :option=value), vae or truth"
#: Options of a row that are none of sampling: the share of true tokens that are replaced; what a segment takes over
#: from the one before: its latents, or (as Open-Sora v1.2 does) its decoded frames, encoded again; and a segment that
#: is made again between its neighbours when all are there, with another seed: then the joins beside it are measured.
WRONG, HANDOVER, AGAIN = "wrong", "handover", "again"
HANDOVERS = ("latents", "pixels")
SEED_AGAIN = 1_000_003


@dataclass(frozen=True)
class Prompt:
    """What to make; `scene` is its truth, where it has one."""

    text: str
    scene: Scene | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table, as asked for: `guided@5:guidance_scale=3`."""

    name: str
    model: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    wrong: float = 0.0
    handover: str = HANDOVERS[0]
    again: int | None = None

    @property
    def file_name(self) -> str:
        """The name without what a file's must not have."""
        return re.sub(r"[^\w.=-]+", "-", self.name)

    def with_changes(self, **changes: Any) -> Row:
        """The same model with other sampling options; what the row itself names stays."""
        return replace(self, changes={**changes, **self.changes})


def parse_row(text: str) -> Row:
    """Raises InputError that names what is wrong with it."""
    match = ROW.fullmatch(text)
    if not match:
        raise InputError(f"--rows {text}: expected {FORM}")
    model, steps, other, tail = match.groups()
    pairs: dict[str, Any] = dict(part.split("=") for part in tail.split(":") if part)
    try:
        wrong = float(pairs.pop(WRONG, 0.0))
    except ValueError:
        raise InputError(f"--rows {text}: {WRONG} is a share of 0 to 1") from None
    if not 0 <= wrong <= 1 or (wrong and model != "true-tokens"):
        raise InputError(f"--rows {text}: {WRONG} is a share of 0 to 1, of true-tokens")
    if (handover := pairs.pop(HANDOVER, HANDOVERS[0])) not in HANDOVERS:
        raise InputError(f"--rows {text}: {HANDOVER} is one of {', '.join(HANDOVERS)}")
    again = pairs.pop(AGAIN, None)
    if again is not None and not (
        str(again).isdecimal() and model in ("text-only", "guided") and handover == "latents"
    ):
        raise InputError(f"--rows {text}: {AGAIN} is the number of a segment, of text-only or guided (the first is 0)")
    if steps is not None:
        pairs = {"steps": int(steps), **pairs}
    elif pairs:
        raise InputError(f"--rows {text}: {other} takes no options")
    return Row(text, model or other, sampling_options(f"--rows {text}", pairs), wrong, handover, again and int(again))


def sampling_options(what: str, texts: Mapping[str, Any]) -> dict[str, Any]:
    """These options with their types. Raises InputError that names `what` if they are none of sampling."""
    try:
        numbers = {name: int(text) if str(text).isdecimal() else text for name, text in texts.items()}
        typed = default_options(SamplingConfig(), **numbers)
    except ValidationError as error:
        raise InputError(f"{what}: {one_line(error)}") from None
    return {name: getattr(typed, name) for name in texts}


@dataclass
class RowResult:
    """Metrics of one row's videos, and what went wrong. `parts` are seconds of planning, rendering and decoding."""

    row: Row
    guidance: str
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    features: list[np.ndarray] = field(default_factory=list)
    parts: list[tuple[float, float, float]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    absent: str | None = None
    distance: float | None = None

    @property
    def seconds(self) -> float | None:
        """Median seconds of a video."""
        return float(np.median([sum(part) for part in self.parts])) if self.parts else None

    def report(self) -> dict[str, Any]:
        """For results.json."""
        if self.absent:
            return {"absent": self.absent}
        parts = np.median(np.array(self.parts), axis=0).tolist() if self.parts else ()
        return {
            "videos": len(self.metrics),
            "options": dict(self.row.changes),
            "guidance": self.guidance,
            "seconds": self.seconds,
            "seconds_of": dict(zip(("ar", "dit", "vae"), parts, strict=False)),
            "frechet_video_distance": self.distance,
            "failures": self.failures,
            "metrics": summary(list(self.metrics.values())) if self.metrics else {},
        }


def held_out_prompts(bundle: Bundle, count: int, use: HeldOut = "measure", segments: int = 1) -> list[Prompt]:
    """Captions of rendered scenes that no training has seen, as long as `segments`."""
    scenes = islice(held_out_scenes(bundle.config, use, segments), count)
    return [Prompt(caption(scene), scene) for scene in scenes]


def read_prompts(path: Path, bundle: Bundle) -> list[Prompt]:
    """One prompt a line. Raises InputError that names all lines that are empty or too long."""
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None
    count_tokens, limit = load_token_counter(bundle.config.text), bundle.config.text.max_tokens
    if lines == [""]:
        raise InputError(f"--prompts {path}: no prompt in it")
    wrong = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            wrong.append(f"line {number} is empty")
        elif (tokens := count_tokens(line)) > limit:
            wrong.append(f"line {number} has {tokens} tokens, at most {limit}")
    if wrong:
        more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
        raise InputError(f"--prompts {path}: {'; '.join(wrong[:MOST_TOLD])}{more}")
    return [Prompt(line.strip()) for line in lines]


class Evaluator:
    """Makes and measures the videos of rows of one bundle."""

    def __init__(self, bundle: Bundle, prompts: Sequence[Prompt], seed: int, segments: int = 1) -> None:
        self.bundle, self.prompts, self.seed, self.segments = bundle, list(prompts), seed, segments
        self.generator = VideoGenerator(bundle)

    @cached_property
    def reference(self) -> list[np.ndarray]:
        """Features of the true videos, for the Fréchet distance."""
        return [video_features(render(prompt.scene)) for prompt in self.prompts if prompt.scene is not None]

    @property
    def scenes(self) -> list[Scene]:
        """The truths. Raises ValueError if a prompt has none."""
        found = [prompt.scene for prompt in self.prompts if prompt.scene is not None]
        if len(found) < len(self.prompts):
            raise ValueError("these prompts have no ground truth")
        return found

    def row(self, row: Row, on_video: Callable[[int, Frames, dict[str, float]], None] | None = None) -> RowResult:
        """Measure a row; `on_video(i, frames, metrics)` sees every video. One that fails is named, the rest goes on."""
        result = RowResult(row, self.guidance(row))
        if not self.bundle.guided and row.model in ("guided", "true-tokens"):
            result.absent = "the bundle has no AR"
            return result
        known = all(prompt.scene is not None for prompt in self.prompts)
        if not known and row.model in ("true-tokens", "truth", "vae"):
            result.absent = "these prompts have no ground truth"
            return result
        for index, prompt in enumerate(self.prompts):
            try:
                frames, parts = self.make(row, index, prompt)
                truth = prompt.scene.shots[0] if prompt.scene else None
                values = measure(frames, truth, self.bundle.config.video.fps, self._joins)
                if self._joins:
                    values |= join_figures(frames, self._joins_of(row)) | drift_figures(frames, self._joins)
                if known:
                    result.features.append(video_features(frames))
            except (ValueError, RuntimeError, ArithmeticError) as error:  # no numbers: FloatingPointError
                result.failures[f"{index}: {prompt.text}"] = " ".join(str(error).split())[:300]
                continue
            result.metrics[index] = values
            if parts:
                result.parts.append(parts)
            if on_video:
                on_video(index, frames, values)
            if sys.stderr.isatty():
                print(f"\r{row.name}  {index + 1}/{len(self.prompts)}", end="", file=sys.stderr, flush=True)
        if known and min(len(result.features), len(self.reference)) > 1:
            result.distance = frechet_distance(result.features, self.reference)
        return result

    def options(self, row: Row) -> GenerationOptions:
        """How the row's model samples; without effect on `truth` and `vae`, which sample nothing."""
        options = default_options(self.bundle.config.sampling, **row.changes)
        return options.model_copy(update={"baseline": row.model == "text-only"})

    def guidance(self, row: Row) -> str:
        """The scales that matter for this row: text / tokens / AR."""
        if row.model in ("truth", "vae"):
            return "–"
        options = self.options(row)
        scales = [options.guidance_scale]
        if row.model != "text-only":
            scales.append(options.token_guidance_scale)
        if row.model == "guided":
            scales.append(options.ar_guidance_scale)
        return " / ".join(f"{scale:g}" for scale in scales)

    def make(self, row: Row, index: int, prompt: Prompt) -> tuple[Frames, tuple[float, float, float] | None]:
        """The video of one row and prompt, and the seconds of its parts. ValueError for latents that are no numbers."""
        if row.model in ("truth", "vae"):
            assert prompt.scene is not None
            if row.model == "truth":
                return render(prompt.scene), None
            return to_frames(self.bundle.vae.decode(self.latents(prompt.scene)))[0], None
        options = self.options(row)
        if row.again is not None:
            return self._made_again(row.again, prompt.text, self.seed + index, options), None
        tokens = self._tokens(row, index, prompt, options)
        texts, seed = [prompt.text] * self.segments, self.seed + index
        hand_over = HandOver.of(self.bundle.config, texts)
        frames: list[Frames] = []
        parts, handed = np.zeros(3), None
        for number in range(self.segments):
            times = [time.perf_counter()]
            plan = next(tokens)
            times.append(time.perf_counter())
            its = segment_options(options, texts, number)
            latents = self.generator.renderer.render(prompt.text, plan, handed, seed, number, its).latents
            times.append(time.perf_counter())
            last = frames[-1][-1] if frames else None
            frames.append(self.generator.decoder.decode(latents, last, options.seam_frames))
            times.append(time.perf_counter())
            parts += np.diff(times)
            handed = hand_over.after(handed, latents, number)
            if row.handover == "pixels":
                handed[:, -hand_over.overlap :] = self._encoded_again(handed[:, -hand_over.overlap :])
        planning, rendering, decoding = parts.tolist()
        return np.concatenate(frames), (planning if row.model == "guided" else 0.0, rendering, decoding)

    def _made_again(self, number: int, text: str, seed: int, options: GenerationOptions) -> Frames:
        """A video whose segment `number` is another one, between the same neighbours."""
        texts = [text] * self.segments
        with TemporaryDirectory() as folder:
            project = Project.create(Path(folder) / "project", self.bundle.fingerprint, options)
            for _ in self.generator.generate(texts, seed, options, project=project):
                pass
            VideoEditor(self.generator, project).reroll(number, seed + SEED_AGAIN)
            return np.concatenate(list(self.generator.generate(texts, seed, options, project=project)))

    def _tokens(self, row: Row, index: int, prompt: Prompt, options: GenerationOptions) -> Iterator[np.ndarray | None]:
        """The guide of each segment: planned by the AR as it is asked for, the true one, or none."""
        if row.model == "guided":
            assert self.generator.planner is not None
            plans = self.generator.planner.plan([prompt.text] * self.segments, self.seed + index, options)
            return (plan.tokens for plan in plans)
        if row.model == "text-only":
            return repeat(None)
        segment, true = self.bundle.config.segment, self._true_tokens(row, index, prompt)
        per_group = len(true) // segment.groups_of(self.segments)
        ends = [segment.groups_of(number) * per_group for number in range(1, self.segments + 1)]
        return (true[end - segment.groups * per_group : end] for end in ends)

    def _encoded_again(self, latents: np.ndarray) -> np.ndarray:
        """Whole groups of latents [C, n, h, w], decoded and encoded."""
        frames = self.generator.decoder.decode(latents)
        encoded = self.bundle.vae.encode(to_video(frames[None]).to(self.bundle.device))
        return encoded[0].float().cpu().numpy()

    @property
    def _joins(self) -> list[int]:
        """First frames of the segments after the first."""
        return [self.bundle.config.segment.groups_of(number) * GROUP_FRAMES for number in range(1, self.segments)]

    def _joins_of(self, row: Row) -> list[int]:
        """Those that a row is measured at: beside the segment that was made again, if one was."""
        return self._joins if row.again is None else self._joins[max(0, row.again - 1) : row.again + 1]

    def latents(self, scene: Scene) -> torch.Tensor:
        """True latents [1, C, t, h, w] of a scene."""
        return self.bundle.vae.encode(to_video(render(scene)[None]).to(self.bundle.device))

    def _true_tokens(self, row: Row, index: int, prompt: Prompt) -> np.ndarray:
        assert prompt.scene is not None
        tokens = self.bundle.codec.encode(self.latents(prompt.scene))[0].int().cpu().numpy()
        return wrong_tokens(tokens, row.wrong, len(self.bundle.codec.codebook), self.seed + index)

    def best(
        self, row: Row, choices: Mapping[str, Sequence[Any]]
    ) -> tuple[dict[str, Any], dict[str, dict[str, float | None]]]:
        """The sampling options among `choices` with the best mean over VBench's dimensions, one after the other.

        Options that the row names, or that its model does not have, are left alone. Also the scores of all values.
        """
        foreign = {
            "text-only": ("token_", "ar_", "top_", "temperature", "start"),
            "true-tokens": ("ar_", "top_", "temp"),
        }
        found, scores = dict[str, Any](), dict[str, dict[str, float | None]]()
        for name, values in choices.items():
            if name in row.changes or name.startswith(foreign.get(row.model, ("\0",))) or row.model in ("truth", "vae"):
                continue
            scored = [(self._score(row.with_changes(**found, **{name: value})), value) for value in values]
            if max(scored)[0] == float("-inf"):
                raise InputError(f"--tune {name}: no video of {row.name} could be made with any of its values")
            found[name] = max(scored, key=lambda pair: pair[0])[1]
            scores[name] = {f"{value:g}": score if np.isfinite(score) else None for score, value in scored}
        return found, scores

    def _score(self, row: Row) -> float:
        """Mean over the dimensions; below every other one if no video could be made.

        More motion than the truth has is no merit: `dynamic_degree` counts by how near it is to that of the scenes.
        """
        figures = summary(list(self.row(row).metrics.values()))
        means = {name: figures[name]["mean"] for name in DIMENSIONS if name in figures}
        if "dynamic_degree" in means and self._true_motion is not None:
            means["dynamic_degree"] = 1 - abs(means["dynamic_degree"] - self._true_motion)
        return float(np.mean(list(means.values()))) if means else float("-inf")

    @cached_property
    def _true_motion(self) -> float | None:
        """The scenes' own dynamic degree."""
        true = self.row(Row("truth", "truth")).metrics
        return float(np.mean([its["dynamic_degree"] for its in true.values()])) if true else None

    def values(self, results: Sequence[RowResult]) -> dict[str, dict[str, dict[int, float]]]:
        """Of each row and metric, each video's value by the number of its caption."""
        return {
            result.row.name: {
                name: {index: round(its[name], 5) for index, its in result.metrics.items() if name in its}
                for name in sorted(set().union(*result.metrics.values()))
            }
            for result in results
            if result.metrics
        }

    def frechet_chance(self) -> float:
        """Fréchet distance of the true videos from those of as many other captions: what chance alone makes."""
        others = held_out_prompts(self.bundle, len(self.scenes), "tune", self.segments)
        return frechet_distance([video_features(render(its.scene)) for its in others if its.scene], self.reference)


def table_of(results: Sequence[RowResult]) -> str:
    """The results as a Markdown table."""
    return results_table([((result.row.name,), result.report()) for result in results])
