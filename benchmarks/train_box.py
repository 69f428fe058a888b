"""Train every stage on rendered scenes on one machine without Ray, and measure the bundle: for a lent GPU.

`python -m benchmarks.train_box --minutes 9 --device cuda --output DIR` needs torch, einops, pydantic, safetensors and
the text encoder (MiniLM's package on PYTHONPATH), but neither Ray nor DeepSpeed nor a file of footage: the stages are
those of `jobs/`, the scenes are rendered in the background. `--set` takes any setting: larger models, batches.

`--start BUNDLE` keeps its VAE and codecs, and goes on with its AR and DiT instead of beginning anew; the text-only DiT
goes on from the guided one without its injection, and gets as many steps. `--only ar dit` leaves the others as they
are; with `--anew` those begin anew all the same, beside the start's VAE and codecs. `--variants NAME …` trains variants
of `jobs/ablate.py` as well, from the bundle `--ablation-start`; `jobs/ablate.py --trained DIR` measures them.
AR and DiTs train at the same time, a process each: together they fill a GPU that none of them can.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from arlon_ray.artifact import Artifact, load_artifact, save_artifact
from arlon_ray.bundle import PARTS, Bundle, save_bundle
from arlon_ray.config import GROUP_FRAMES, Config, load_config, override
from arlon_ray.models.text import text_identity
from arlon_ray.training.engine import Stage, TorchEngine
from arlon_ray.training.loop import train_locally
from arlon_ray.training.reporting import ConsoleReporter
from arlon_ray.training.stages.ar import ArPaths, ArStage
from arlon_ray.training.stages.codec import CodecStage
from arlon_ray.training.stages.dit import DitPaths, DitStage, text_only
from arlon_ray.training.stages.vae import VaeStage
from benchmarks.machine import device_or_exit, machine
from benchmarks.rendered_latents import Mix, Parts, RenderedLatents, in_background, render_in_background
from data_pipeline.synthetic import render
from data_pipeline.worlds import training_seed, whole_scenes
from jobs.evaluation import Evaluator, held_out_prompts, parse_row, table_of
from jobs.variants import NAMES, VARIANTS, Variant

#: Shares of the time for training, where nothing else says how many steps; the rest is for encoding and measuring.
SHARES = {"vae": 0.12, "vqvae_fine": 0.05, "vqvae_coarse": 0.03, "ar": 0.2, "dit_base": 0.2, "dit": 0.25}
PROBED, SEED = 8, 3  # of the scenes, where none is asked for
ROWS = ("truth", "vae", "text-only@30", "text-only@5", "guided@5", "true-tokens@5")


class PixelScenes:
    """17-frame groups of rendered scenes, for the VAE."""

    def __init__(self, config: Config, count: int, seed: int) -> None:
        scenes = islice(whole_scenes(config, training_seed(seed, 0)), count)
        height, width = config.video.height, config.video.width
        self.groups = np.concatenate([render(s).reshape(-1, GROUP_FRAMES, height, width, 3) for s in scenes])
        self.kept = max(1, len(self.groups) // 20)

    def training(self, seed: int, count: int) -> np.ndarray:
        """See GroupSource."""
        return self.groups[self.kept + np.random.default_rng(seed).integers(len(self.groups) - self.kept, size=count)]

    def held_out(self, count: int) -> np.ndarray:
        """See GroupSource."""
        return self.groups[: min(count, self.kept)]


@dataclass(frozen=True)
class Job:
    """A model to train in a process of its own."""

    name: str
    section: Literal["ar", "dit"]
    config: Config  # with its steps
    path: Path
    parents: dict[str, str]
    folders: dict[str, Path]  # of the VAE and the codecs
    shards: Path
    count: int
    device: str
    every: int = 50  # steps after which one more shard is drawn from
    seed: int = SEED

    def stage(self) -> Stage:
        """Raises ArtifactError if what it starts from does not fit."""
        training = getattr(self.config, self.section).training
        size, every = training.batch_size, self.every
        source = RenderedLatents(self.config, self.shards, self.count, size, self.device, every=every, seed=self.seed)
        if training.data_share < 1:
            source = source.share(training.data_share)
        vae, fine, coarse = (self.folders[name] for name in ("vae", "codec_fine", "codec_coarse"))
        if self.section == "ar":
            return ArStage(self.config, source, ArPaths(fine, vae), self.parents)
        guided = self.config.dit.injection.enabled
        paths = DitPaths(vae, fine, coarse, ar=self.folders.get("ar")) if guided else DitPaths(vae)
        parents = dict(self.parents)
        if paths.ar is not None:
            parents["ar_tokens"] = load_artifact(paths.ar, "ar").fingerprint
        return DitStage(self.config, source, paths, parents)


def train_job(job: Job) -> None:
    """Train and export it, where it is not there yet."""
    if not (job.path / "lineage.json").exists():
        stage = job.stage()
        train_locally(
            stage, job.path, device=job.device, reporter=ConsoleReporter(job.name, stage.training.steps, bar=False)
        )


def train_together(jobs: list[Job]) -> None:
    """All at the same time. Raises RuntimeError that names those that failed."""
    processes = {job.name: in_background(train_job, job) for job in jobs}
    for process in processes.values():
        process.join()
    if failed := [name for name, process in processes.items() if process.exitcode]:
        raise RuntimeError(f"these did not train: {', '.join(failed)}")


def steps_within(stage: Stage, device: str, seconds: float) -> int:
    """How many steps fit: from the median of a few, on weights that are thrown away."""
    engine, times = TorchEngine(stage, device), []
    generator = torch.Generator(device=engine.device)
    for step in range(PROBED):
        begin = time.perf_counter()
        engine.step(stage.batch(step, 0, 1), generator, 1.0)  # its loss is read: the device has ended
        times.append(time.perf_counter() - begin)
    return max(1, int(seconds / float(np.median(times[2:]))))


@dataclass
class Box:
    """One run of the script."""

    config: Config
    output: Path
    device: str
    minutes: float
    videos: int
    mixes: list[Mix]
    processes: int
    shard: int
    steps: dict[str, int]
    start: Bundle | None = None
    only: Sequence[str] = ()  # of what goes on from `start`; none: all
    seed: int = SEED
    anew: bool = False  # what is trained begins anew beside the start's other parts

    def path(self, name: str) -> Path:
        """Where a part lies: the start's VAE and codecs stay where they are."""
        if self.start is not None and (name in ("vae", "codec_fine", "codec_coarse") or self._is_left(name)):
            return self.start.path / PARTS[name][0]
        return self.output / name

    def _is_left(self, name: str) -> bool:
        return bool(self.only) and name not in self.only

    def train(self) -> Bundle:
        """Every stage; returns the bundle."""
        if self.start is None:
            self._train_latent_space()
        shards = max(1, self.videos // self.shard)
        with self._rendering(self.output / "shards", shards, codecs=True):
            jobs = self._first_jobs(shards)
            train_together([self._timed(job) for job in jobs])
            if self.start is None:  # the guided DiT begins with what the text-only one has learnt
                base = override(self.config, [f"dit.init={self.path('dit_base')}"])
                train_together([self._timed(self._job("dit", "dit", base, shards))])
        parts = {name: path for name in PARTS if (path := self.path(name)).exists()}
        return Bundle(save_bundle(self.output / "bundle", self.config, parts, self._text), self.device)

    def ablate(self, start: Bundle, variants: list[Variant], steps: int, ar_steps: int) -> None:
        """Variants from one text-only DiT, on the same shards."""
        shards = max(1, self.videos // self.shard)
        common = [
            "dit.base_steps=0", "dit.train_only=all", f"dit.training.steps={steps}", "ar.init=null",
            f"dit.init={start.path / PARTS['dit_base'][0]}", f"ar.training.steps={ar_steps}",
        ]  # fmt: skip
        jobs = []
        for variant in variants:
            config = override(self.config, [*common, *variant.overrides])
            job = self._job(variant.name, variant.stage, config, shards, start)
            path = self.output / "variants" / variant.name / variant.stage
            jobs.append(replace(job, path=path, config=_quietly(job.config, job.section), every=1))
        train_together(jobs)

    @property
    def _text(self) -> str:
        return text_identity(self.config.text)

    def _parents(self) -> dict[str, str]:
        names = [name for name in ("vae", "codec_fine", "codec_coarse") if (self.path(name) / "lineage.json").exists()]
        scenes = f"rendered from seed {self.seed}, {self.videos} videos of {' '.join(map(str, self.mixes))}"
        return {"text": self._text, "scenes": scenes} | {
            name: load_artifact(self.path(name), PARTS[name][1]).fingerprint for name in names
        }

    def _job(
        self, name: str, section: Literal["ar", "dit"], config: Config, shards: int, giver: Bundle | None = None
    ) -> Job:
        """`giver` has the AR that draws tokens for a DiT; None: the start, or what this run has trained."""
        folders = {part: self.path(part) for part in ("vae", "codec_fine", "codec_coarse")}
        if section == "dit" and config.dit.ar_token_probability:
            known = giver or self.start
            folders["ar"] = self.path("ar") if known is None else known.path / PARTS["ar"][0]
        path, where = self.path(name), self.output / "shards"
        return Job(name, section, config, path, self._parents(), folders, where, shards, self.device, seed=self.seed)

    def _first_jobs(self, shards: int) -> list[Job]:
        if self.start is None:
            base = text_only(self.config, self.config.dit.training.steps)
            return [self._job("ar", "ar", self.config, shards), self._job("dit_base", "dit", base, shards)]
        ar, dit = (self.start.path / PARTS[name][0] for name in ("ar", "dit"))
        plain = without_injection(self.start.artifacts["dit"], self.output / "start_base")
        guided = override(self.config, [f"ar.init={ar}", f"dit.init={dit}"])
        base = override(text_only(self.config, self.config.dit.training.steps), [f"dit.init={plain.path}"])
        models: list[tuple[str, Literal["ar", "dit"], Config]] = [
            ("ar", "ar", guided), ("dit", "dit", guided), ("dit_base", "dit", base)
        ]  # fmt: skip
        begun = {"ar": {"ar_init": self.start.artifacts["ar"].fingerprint}}
        begun |= {name: {"dit_init": self.start.artifacts["dit"].fingerprint} for name in ("dit", "dit_base")}
        jobs = [self._job(name, section, config, shards) for name, section, config in models]
        wanted = [job for job in jobs if not self._is_left(job.name)]
        if self.anew:
            return [replace(job, config=override(job.config, [f"{job.section}.init=null"])) for job in wanted]
        return [replace(job, parents=job.parents | begun[job.name]) for job in wanted]

    def _timed(self, job: Job) -> Job:
        """With as many steps as it is to have."""
        key = "dit" if job.name == "dit_base" and self.start is not None else job.name
        steps = self.steps.get(key) or self.steps.get(job.section)
        if not steps:
            steps = steps_within(job.stage(), self.device, SHARES[job.name] * self.minutes * 60)
        changed = override(job.config, [f"{job.section}.training.steps={steps}"])
        return replace(job, config=_quietly(changed, job.section))

    def _train_latent_space(self) -> None:
        """The VAE, and the codecs on latents without tokens."""
        pixels = PixelScenes(self.config, min(self.videos, 2000), self.seed)
        self._train_here("vae", "vae", lambda c: VaeStage(c.vae, pixels, c.seed))
        folder = self.output / "untokenised"
        shards = max(1, min(self.videos, 2000) // self.shard)
        with self._rendering(folder, shards, codecs=False):
            parents = self._parents()
            for role in ("fine", "coarse"):

                def codec(c: Config, role: Any = role) -> Stage:
                    settings = getattr(c.vqvae, role)
                    size = settings.training.batch_size
                    latents = RenderedLatents(c, folder, shards, size, self.device, seed=self.seed)
                    return CodecStage(
                        settings, role, c.vae.latent_channels, latents, self.path("vae"), dict(parents), c.seed
                    )

                self._train_here(f"codec_{role}", f"vqvae.{role}", codec)

    def _train_here(self, name: str, section: str, build: Callable[[Config], Stage]) -> None:
        share = SHARES[section.replace(".", "_")]
        steps = self.steps.get(name) or steps_within(build(self.config), self.device, share * self.minutes * 60)
        config = _quietly(override(self.config, [f"{section}.training.steps={steps}"]), section)
        train_locally(build(config), self.path(name), device=self.device)

    def _rendering(self, folder: Path, shards: int, codecs: bool) -> _Rendering:
        parts = Parts(self.path("vae"))
        if codecs:
            parts = Parts(self.path("vae"), self.path("codec_fine"), self.path("codec_coarse"))
        return _Rendering(
            render_in_background(
                self.config, self.mixes, parts, folder, shards=shards, size=self.shard, seed=self.seed,
                device=self.device, processes=self.processes,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class _Rendering:
    """Rendering in the background; what goes wrong there, or in the block, ends both."""

    process: Any

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.process.terminate()
        self.process.join()
        if kind is None and self.process.exitcode:
            raise RuntimeError("rendering failed: see above")


def without_injection(dit: Artifact, path: Path) -> Artifact:
    """A guided DiT as a text-only one: what it is without tokens."""
    tensors = {name: value for name, value in dit.tensors().items() if not name.startswith("injection.")}
    injection = {**dit.config["injection"], "enabled": False}
    kept = {name: its for name, its in dit.lineage.parents.items() if not name.startswith("codec")}
    return save_artifact(path, kind="dit", config={**dit.config, "injection": injection}, tensors=tensors, parents=kept)


def _quietly(config: Config, section: str) -> Config:
    """Few checkpoints (a run that is cut off goes on from the last) and few lines."""
    training = config
    for key in section.split("."):
        training = getattr(training, key)
    steps = training.training.steps  # type: ignore[attr-defined]
    keys = dict.fromkeys(("checkpoint_every", "log_every"), max(1, steps // 10))
    return override(config, [f"{section}.training.{name}={value}" for name, value in keys.items()])


def _pairs(texts: list[str]) -> Iterator[tuple[str, int]]:
    for text in texts:
        name, _, value = text.partition("=")
        yield name, int(value)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", default="tiny")
    flags.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    flags.add_argument("--minutes", type=float, default=9.0, help="time for training, where --steps says no number")
    flags.add_argument("--steps", nargs="+", default=[], metavar="PART=N", help="steps of vae, codec_fine, ar, dit, …")
    flags.add_argument("--videos", type=int, default=6000)
    flags.add_argument(
        "--mix", nargs="+", metavar="GRADE[/still]:GROUPS=SHARE", help="default: the configuration's own grade"
    )
    flags.add_argument("--shard", type=int, default=2000, help="scenes that are encoded together")
    flags.add_argument("--processes", type=int, default=2, help="that render")
    flags.add_argument("--start", metavar="BUNDLE")
    flags.add_argument("--only", nargs="+", default=[], choices=("ar", "dit", "dit_base"), help="of --start's models")
    flags.add_argument("--anew", action="store_true", help="they do not go on from --start: only its other parts stay")
    flags.add_argument("--seed", type=int, default=SEED, help="of the scenes: another one than what --start has seen")
    flags.add_argument("--variants", nargs="*", default=[])
    flags.add_argument("--only-variants", action="store_true", help="on the shards that an earlier run wrote")
    flags.add_argument("--ablation-start", metavar="BUNDLE", help="guided bundle with its text-only DiT")
    flags.add_argument("--count", type=int, default=64, help="held-out captions to measure on; 0: none")
    flags.add_argument("--rows", nargs="+", default=list(ROWS))
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--output", type=Path, default=Path("runs/box"))
    options = flags.parse_args(arguments)
    device_or_exit(options.device)
    steps = dict(_pairs(options.steps))
    if unknown := set(options.variants) - set(NAMES):
        flags.error(f"--variants {sorted(unknown)[0]}: expected some of {', '.join(NAMES)}")
    if options.variants and not (options.ablation_start and "variants" in steps):
        flags.error("--variants need --ablation-start BUNDLE and --steps variants=N")
    if options.only and not options.start:
        flags.error("--only says which models of --start BUNDLE go on")
    if options.anew and not options.only:
        flags.error("--anew needs --start BUNDLE and --only: which of its models begin anew")
    config = load_config(options.config, options.overrides)
    groups = ",".join(map(str, config.data.bucket_groups))
    mixes = [Mix.parse(text) for text in options.mix or [f"{config.data.sample_grade}:{groups}=1"]]
    box = Box(
        config, options.output, options.device, options.minutes, options.videos, mixes, options.processes,
        options.shard, steps, Bundle(options.start) if options.start else None, options.only, options.seed,
        options.anew,
    )  # fmt: skip
    begin = time.perf_counter()
    bundle = Bundle(options.output / "bundle") if options.only_variants else box.train()
    if options.variants:
        chosen = [variant for variant in VARIANTS if variant.name in options.variants]
        ar_steps = steps.get("ar-variants", steps["variants"])
        box.ablate(Bundle(options.ablation_start), chosen, steps["variants"], ar_steps)
    return report(bundle, options.output, (time.perf_counter() - begin) / 60, options.rows, options.count)


def report(bundle: Bundle, output: Path, minutes: float, rows: list[str], count: int) -> dict[str, Any]:
    """Measure the bundle and write results.json."""
    found: dict[str, Any] = {
        "machine": machine(),
        "minutes": minutes,
        "held_out": {name: dict(artifact.lineage.metrics) for name, artifact in bundle.artifacts.items()},
        "rows": {},
    }
    if count:
        evaluator = Evaluator(bundle, held_out_prompts(bundle, count), 0)
        results = [evaluator.row(parse_row(row)) for row in rows]
        print(f"\n{table_of(results)}\n")
        found["rows"] = {result.row.name: result.report() for result in results}
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(output / "results.json")
    return found


if __name__ == "__main__":
    main()
