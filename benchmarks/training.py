"""What Ray, DeepSpeed, checkpoints and tracking add to a step of training, beside a bare loop of the same model.

`python -m benchmarks.training --steps 20 --output benchmarks/results/training_two_cores.json`

*bare*: batches, forward, backward, clipping and optimizer in this process, nothing else. *ray*: `train_stage` with one
worker that has the same cores, ZeRO 1, a log line every step, a checkpoint, and MLflow in SQLite. Both train the
text-only DiT of the configuration on the same latents. They take turns step by step: the worker is stopped (SIGSTOP)
while the bare loop makes a step, so that both meet the same machine, however busy others make it. A step of *ray* is
the time between the figures of two steps as the driver hears them, less that of the stop; the step with the checkpoint
counts for itself, as its share of the configuration's own `checkpoint_every`. That Ray starts stands beside it, and
which share of *ray*'s steps was waiting for data.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from arlon_ray.config import Config, override
from arlon_ray.training.engine import Stage, autocast, build_objective, derived_seed
from arlon_ray.training.optimizer import (
    build_optimizers,
    clipped_parameters,
    learning_rate_scale,
    parameter_groups,
    set_learning_rates,
)
from arlon_ray.training.reporting import QuietReporter
from arlon_ray.training.stages.dit import DitPaths, DitStage, text_only
from benchmarks.machine import machine
from benchmarks.rendered_latents import Parts, rendered_latents
from jobs.command_line import InputError, parser, read_config, run, vae_folder
from jobs.ray_session import connect, threads_per_worker
from jobs.ray_training import train_stage
from jobs.tracking import Tracking

#: Rendered scenes that are trained on, at most.
SCENES = 64
#: Steps that warm up and do not count: the heap grows over the first.
WARM_UP = 3


def stage_of(config: Config, vae: Path, steps: int) -> Stage:
    """The text-only DiT on rendered scenes; Ray's worker builds it by the same call."""
    training = trained(config, steps)
    batch = config.dit.training.batch_size
    source = rendered_latents(config, min(SCENES, batch * steps), Parts(vae), batch, "cpu")
    return DitStage(training, source, DitPaths(vae), {})


def bare_steps(config: Config, vae: Path, steps: int) -> Iterator[float]:
    """The bare loop; seconds of each step that it makes."""
    stage = stage_of(config, vae, steps)
    objective, training, device = build_objective(stage), stage.training, torch.device("cpu")
    optimizers, generator = build_optimizers(parameter_groups(objective, training)), torch.Generator()
    clipped = clipped_parameters(objective)
    for step in range(steps):
        begin = time.perf_counter()
        batch = stage.batch(step, 0, 1)
        generator.manual_seed(derived_seed(stage.seed, stage.name, step, 0))
        with autocast(training, device):
            losses = objective(batch, generator)
        objective.zero_grad(set_to_none=True)
        losses.loss.backward()
        nn.utils.clip_grad_norm_(clipped, training.clip_norm)
        for optimizer in optimizers:
            set_learning_rates(optimizer.param_groups, learning_rate_scale(step, training))
            optimizer.step()
        yield time.perf_counter() - begin


class _Alternating(QuietReporter):
    """A Reporter that lets the bare loop make a step whenever it hears of one, and notes what both took."""

    def __init__(self, bare: Iterator[float]) -> None:
        self.bare: list[float] = []
        self.ray: list[float] = []
        self.waits: list[float] = []  # shares of the steps
        self._bare, self._resumed = bare, 0.0

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        if "step_s" not in values:
            return
        heard = time.perf_counter()
        with _stopped_workers():
            self.bare.append(next(self._bare))
        self.ray.append(heard - self._resumed)
        self.waits.append(values["data_wait"])
        print(f"step {step}: bare {self.bare[-1]:.3f} s, ray {self.ray[-1]:.3f} s", flush=True)
        self._resumed = time.perf_counter()


@contextmanager
def _stopped_workers() -> Iterator[None]:
    """The training worker of this process's own Ray stands still."""
    workers = [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()]
    if not workers:
        raise RuntimeError("no worker of Ray Train among this process's children: its name must have changed")
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def compared(config: Config, vae: Path, steps: int) -> dict[str, Any]:
    """Seconds of the steps of both, in turn, and of all that is not a step."""
    times, training = _Alternating(bare_steps(config, vae, steps)), trained(config, steps).dit.training
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_stage(
            "dit_base",
            partial(stage_of, vae=vae, steps=steps),
            {"config": config},
            config=config,
            training=training,
            output=Path(folder) / "dit",
            key="benchmark",
            tracking=Tracking(config, Path(folder)),
            reporters=[times],
        )
    whole = time.perf_counter() - begin
    # a step is heard of before its checkpoint is written
    written = training.checkpoint_every
    counted = [i for i in range(WARM_UP, steps) if i != written]
    bare, ray = ([seconds[i] for i in counted] for seconds in (times.bare, times.ray))
    step, checkpoint = statistics.median(ray), max(0.0, times.ray[written] - statistics.median(ray))
    share = checkpoint / config.dit.training.checkpoint_every
    return {
        "bare_s": bare,
        "ray_s": ray,
        "checkpoint_s": checkpoint,
        "data_wait": {"median": statistics.median(times.waits), "max": max(times.waits[i] for i in counted)},
        "not_steps_s": whole - sum(times.bare) - step * steps,
        # what is heard comes in the rhythm in which the journal is read: of all steps together that is nothing
        "ray_over_bare": sum(ray) / sum(bare) + share / statistics.mean(bare),
        "quartiles": statistics.quantiles(ours / theirs for ours, theirs in zip(ray, bare, strict=True))[::2],
    }


def trained(config: Config, steps: int) -> Config:
    """The text-only DiT for so many steps, with one checkpoint in the middle, and the one at the end."""
    middle = WARM_UP + (steps - WARM_UP) // 2
    return override(text_only(config, steps), [f"dit.training.checkpoint_every={middle}"])


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="training.json")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init of the configuration)")
    flags.add_argument("--steps", type=int, default=20, help="of each (default: 20)")
    options = flags.parse_args()
    if options.steps < WARM_UP + 4:
        raise InputError(f"--steps {options.steps}: expected at least {WARM_UP + 4}")
    cores = torch.get_num_threads()
    more = ["cluster.num_workers=1", f"cluster.cpus_per_worker={cores}", "dit.training.log_every=1"]
    config = override(read_config(options), more)
    assert threads_per_worker(config) == cores
    vae = vae_folder(options.vae, config)
    # Ray has its workers give way to others, the bare loop does not: on a busy machine that would be measured
    os.environ.setdefault("RAY_worker_niceness", "0")
    with connect(config):
        found = compared(config, vae, options.steps)
    result = {
        "machine": machine(),
        "config": {
            "name": config.name,
            "batch_size": config.dit.training.batch_size,
            "steps": options.steps,
            "optimizer": config.dit.training.optimizer,
            "checkpoint_every": config.dit.training.checkpoint_every,
        },
        **found,
    }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"a step takes {result['ray_over_bare']:.3f} times as long; {options.output}")


if __name__ == "__main__":
    run(main)
