"""The one training loop: steps, logging, checkpoints, resuming, evaluation and export, for every stage and engine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from arlon_ray.artifact import Artifact, one_line
from arlon_ray.precision import NOTE, falls_back, peak_flops_per_s
from arlon_ray.training.best import BestCheckpoint
from arlon_ray.training.checkpoints import Checkpoints, FolderCheckpoints, read_progress, write_progress
from arlon_ray.training.engine import (
    TOKENS,
    Engine,
    Evaluation,
    NonFiniteError,
    Stage,
    TorchEngine,
    build_objective,
    derived_seed,
    seed_everything,
)
from arlon_ray.training.machine import MachineUse
from arlon_ray.training.optimizer import WeightAverage, learning_rate_scale
from arlon_ray.training.reporting import ConsoleReporter
from arlon_ray.training.state import SavedState

#: Clip ids named when a batch breaks the training; a batch may hold thousands.
NAMED_CLIPS = 64


class TrainingError(RuntimeError):
    """Training that cannot go on. One line that names the stage, the step and what to look at."""


class StoppedError(TrainingError):
    """Training that was asked to stop, and can go on from the checkpoint of the step where it did."""


class Watch(Protocol):
    """Whether somebody wants something of a running training. Every rank asks after the same steps."""

    def wish(self, step: int) -> Literal["none", "save", "stop"]:
        """ "save": a checkpoint now (this machine may be taken away); "stop": that, and no more steps."""


class Reporter(Protocol):
    """Where a run's figures go. Called on rank 0 only."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after `step` steps."""

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """uint8 [H, W, 3]."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint of `step` was written."""

    def line(self, text: str) -> None:
        """Something worth saying once."""


@dataclass
class Window:
    """Sums since the last log line, so that a logged figure is a mean over `log_every` steps."""

    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        """Take in one step."""
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """The mean of each figure."""
        return {name: value / self.steps for name, value in self.sums.items()}


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves; on the ranks above 0 only `steps`."""

    steps: int
    artifact: Artifact | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)


class _Run:
    """The loop's own state: the step, the sums, the average weights."""

    def __init__(
        self, stage: Stage, engine: Engine, reporter: Reporter, checkpoints: Checkpoints, key: str, flops: float
    ) -> None:
        self.flops = flops
        self.stage, self.engine, self.reporter, self.checkpoints = stage, engine, reporter, checkpoints
        self.key, self.step, self.saved_step = key, 0, 0
        self.window, self.timing = Window(), Window()
        self.machine = MachineUse(engine.device)
        self.generator = torch.Generator(device=engine.device)
        self.folder: Path | None = None
        decay = stage.training.ema_decay
        self.average = WeightAverage(engine.parameters(), decay) if decay else None

    def resume(self) -> None:
        """Go on from the newest whole checkpoint of this run, if there is one."""
        for folder in self.checkpoints.newest_first():
            progress, saved, wrong = read_progress(folder), None, ""
            try:
                saved = SavedState(folder)
                saved.verify(self.engine.rank, self.engine.world)
            # A damaged file shows itself as one of many errors, depending on where it was cut.
            except Exception as error:
                wrong = one_line(error)
            # each worker has looked at its share of the files: all of them go on from the same checkpoint
            if self.engine.average({"damaged": float(bool(wrong))})["damaged"] or saved is None:
                self.report_line(f"checkpoint {folder} cannot be read ({wrong or 'damaged'}); trying the one before")
                continue
            self._load(folder, progress, saved)
            self.report_line(f"{self.stage.name}: going on after step {self.step} of {self.stage.training.steps}")
            return

    def _load(self, folder: Path, progress: dict[str, Any], saved: SavedState) -> None:
        """Raises TrainingError where it does not fit: what is half loaded must not be trained on."""
        step, window = int(progress["step"]), Window(**progress["window"])
        try:
            self.engine.load(saved)
            if self.average:
                saved.fill(self.average.pieces)
        except (KeyError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"{self.stage.name}: the checkpoint {folder} does not fit: {one_line(error)}; remove it and run again"
            ) from None
        self.step, self.saved_step, self.window, self.folder = step, step, window, folder

    def save(self, values: Mapping[str, float], *, wait: bool) -> None:
        """Write a checkpoint of this step; `values` are the latest figures. `wait`: until it lies where it is kept."""
        # Every rank goes on from the ranks' mean, so that figures of a resumed run equal those of an unbroken one.
        window = Window(self.window.steps, self.engine.average(self.window.sums)) if self.window.steps else Window()

        def fill(folder: Path) -> None:
            self.engine.save(folder, self.step, self.average.pieces if self.average else ())
            if self.engine.rank == 0:
                progress = {"step": self.step, "key": self.key, "world": self.engine.world, "window": window.__dict__}
                write_progress(folder, progress)

        self.folder = self.checkpoints.write(self.step, fill, values, wait=wait)
        self.saved_step = self.step
        if self.engine.rank == 0:
            self.reporter.checkpoint(self.step, self.folder)

    def one_step(self) -> None:
        """Draw the batch of this step, and take the step."""
        stage, engine = self.stage, self.engine
        begin = time.perf_counter()
        batch = stage.batch(self.step, engine.data_rank, engine.data_world)
        ready = time.perf_counter()
        seed_everything(stage.seed, stage.name, self.step, engine.data_rank)
        self.generator.manual_seed(derived_seed(stage.seed, stage.name, self.step, engine.data_rank))
        scale = learning_rate_scale(self.step, stage.training)
        try:
            values = engine.step(batch, self.generator, scale)
        except NonFiniteError as error:
            raise TrainingError(self._broken(batch, error)) from None
        if self.average:
            self.average.update(self.step)
        self.step += 1
        self.window.add(values)
        seconds = {"step": time.perf_counter() - begin, "data": ready - begin, **engine.clock.read()}
        self.timing.add({f"{part}_s": its for part, its in seconds.items()})

    def _broken(self, batch: Mapping[str, Any], error: NonFiniteError) -> str:
        ids = batch.get("clip_id")
        clips = ""
        if ids is not None:
            named = [str(int(i)) for i in list(ids)[:NAMED_CLIPS]]
            clips = f"; clips of the batch: {', '.join(named)}{', …' if len(ids) > NAMED_CLIPS else ''}"
        kept = f"the checkpoint of step {self.saved_step} is kept" if self.saved_step else "there is no checkpoint yet"
        return f"{self.stage.name}: step {self.step} on rank {self.engine.rank}: {error}{clips}; {kept}"

    def log(self) -> dict[str, float]:
        """Report the means over the steps since the last time, over all workers."""
        means = self.engine.average(self.window.means() | self.machine.read())
        seconds = self.timing.means()
        training = self.stage.training
        means["learning_rate"] = training.learning_rate * learning_rate_scale(self.step - 1, training)
        means["step_s"] = seconds["step_s"]
        means["data_wait"] = seconds["data_s"] / seconds["step_s"]
        parts = {name: its for name, its in seconds.items() if name not in ("step_s", "data_s")}
        means |= {f"time/{name}": its for name, its in parts.items()}
        means["samples_per_s"] = training.batch_size / seconds["step_s"]
        if tokens := means.pop(TOKENS, 0.0):
            means["tokens_per_s"] = tokens * training.accumulation * self.engine.data_world / seconds["step_s"]
        if self.flops:
            flops_per_s = self.flops / self.engine.world / seconds["step_s"]
            means["tflops_per_s"] = flops_per_s / 1e12
            if peak := peak_flops_per_s(training.precision, self.engine.device):
                means["mfu"] = flops_per_s / peak
        self.window, self.timing = Window(), Window()
        if self.engine.rank == 0:
            self.reporter.metrics(self.step, means)
        return means

    def best(self) -> BestCheckpoint | None:
        """Where the best checkpoint is kept, if one is."""
        figure = self.stage.training.keep_best
        if not figure or self.folder is None:
            return None
        return BestCheckpoint(self.folder.parent, self.key, figure, self.stage.figures[figure])

    def keep_best(self, evaluation: Evaluation) -> None:
        """Keep the checkpoint that was evaluated, if it is the best so far. A storage that fails costs only that."""
        if (best := self.best()) is None or best.figure not in evaluation.metrics:
            return
        assert self.folder is not None
        try:
            best.offer(self.folder, self.step, evaluation.metrics[best.figure])
        except OSError as error:
            self.report_line(f"{self.stage.name}: the checkpoint of step {self.step} is not kept as the best: {error}")

    def report_line(self, text: str) -> None:
        """Print once, not once a worker."""
        if self.engine.rank == 0:
            self.reporter.line(text)


def run_stage(
    stage: Stage,
    engine: Engine,
    reporter: Reporter,
    *,
    output: Path,
    checkpoints: Checkpoints,
    key: str = "",
    watch: Watch | None = None,
    flops: float = 0.0,
) -> StageResult:
    """Train `stage` to its last step, from the newest checkpoint of the same `key`, and write its artefact to `output`.

    All randomness of a step comes from (seed, stage, step, rank): a resumed run gives the numbers of an unbroken one.
    Raises TrainingError when the loss or the gradient stops being a number, the last checkpoint stays; StoppedError
    when `watch` asks for it. `flops`: of a step over all workers, for figures of how well machines are used.
    """
    run, training = _Run(stage, engine, reporter, checkpoints, key, flops), stage.training
    trained, frozen = engine.counts
    more = f", {frozen:,} are frozen" if frozen else ""
    run.report_line(f"{stage.name}: {trained:,} parameters train{more}")
    if falls_back(training.precision, engine.device):
        run.report_line(f"note: {NOTE}")
    run.resume()
    if engine.average({"step": float(run.step)})["step"] != run.step:
        raise TrainingError(
            f"{stage.name}: the workers found different checkpoints; remove the damaged one and run again"
        )
    latest: dict[str, float] = run.window.means() if run.window.steps else {}
    while run.step < training.steps:
        run.one_step()
        last = run.step == training.steps
        if last or run.step == 1 or run.step % training.log_every == 0:
            latest = run.log()
        wish = "none" if watch is None or last else watch.wish(run.step)
        look = training.evaluate_every > 0 and run.step % training.evaluate_every == 0 and not last
        if last or look or wish != "none" or run.step % training.checkpoint_every == 0:
            run.save(latest, wait=last or look or wish == "stop")
        if look and engine.rank == 0:
            run.keep_best(_evaluate(run)[1])
        if wish == "stop":
            raise StoppedError(
                f"{stage.name}: stopped after step {run.step} of {training.steps}, whose checkpoint is kept; "
                "the same command goes on from there"
            )
    return _finish(run, output, latest) if engine.rank == 0 else StageResult(run.step)


def _evaluate(run: _Run) -> tuple[nn.Module, Evaluation]:
    """Measure the last checkpoint, with the averaged weights where there are any, and report it. Returns its model.

    That is a model of its own: the engine's may be split over the workers.
    """
    assert run.folder is not None, "what is evaluated was saved before"
    objective, evaluation = _measured(run, run.folder)
    run.reporter.metrics(run.step, {f"held_out/{name}": value for name, value in evaluation.metrics.items()})
    for name, picture in evaluation.pictures.items():
        run.reporter.picture(name, picture, run.step)
    return objective, evaluation


def _measured(run: _Run, folder: Path) -> tuple[nn.Module, Evaluation]:
    """The model of a checkpoint, and what it comes to on held-out samples."""
    stage, device = run.stage, run.engine.device
    objective = build_objective(stage).to(device)
    saved = SavedState(folder)
    saved.verify()
    saved.load_into(objective)
    seed_everything(stage.seed, stage.name, "evaluation")
    objective.eval()
    return objective, stage.evaluate(objective, device)


def _finish(run: _Run, output: Path, latest: Mapping[str, float]) -> StageResult:
    """Evaluate what the training came to, and export it, or what was better on the way (`keep_best`)."""
    objective, evaluation = _evaluate(run)
    run.keep_best(evaluation)
    best = run.best()
    kept = best.read() if best else None
    if best and kept and kept.step != run.step:
        last = evaluation.metrics.get(kept.figure, math.nan)
        run.report_line(
            f"{run.stage.name}: exporting the weights of step {kept.step}, whose held-out {kept.figure} is "
            f"{kept.value:.4g} ({last:.4g} after the last step)"
        )
        objective, evaluation = _measured(run, best.folder)
    figures = {name: float(value) for name, value in evaluation.metrics.items()}
    if kept:
        figures["best_step"] = float(kept.step)
    if "loss" in latest:
        figures.setdefault("loss", latest["loss"])
    artifact = run.stage.export(objective, output, metrics=figures, key=run.key)
    return StageResult(run.step, artifact, evaluation)


def train_locally(
    stage: Stage,
    output: Path,
    *,
    key: str = "",
    device: str = "cpu",
    checkpoints: Path | None = None,
    reporter: Reporter | None = None,
) -> StageResult:
    """Train in this process.

    Checkpoints lie in `checkpoints` (default: a hidden folder beside `output`) until the artefact is there.
    """
    store = FolderCheckpoints(checkpoints or output.parent / f".{output.name}.checkpoints", key)
    result = run_stage(
        stage,
        TorchEngine(stage, device),
        reporter or ConsoleReporter(stage.name, stage.training.steps),
        output=output,
        checkpoints=store,
        key=key,
    )
    store.clear()
    return result
