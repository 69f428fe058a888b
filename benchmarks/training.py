"""What Ray, DeepSpeed, checkpoints and tracking add to a step of training, beside a bare loop of the same model.

`python -m benchmarks.training --steps 20 --runs 3 --output benchmarks/results/training_two_cores.json`

*bare*: batches, forward, backward, clipping and optimizer in this process, nothing else. *ray*: `train_stage` with one
worker that has the same cores, ZeRO 1, a log line every step, a checkpoint, and MLflow in SQLite. Both train the
text-only DiT of the configuration on the same latents. A step of *ray* is the median time between the figures of two
steps as the driver sees them, and its share of a checkpoint: what the one that is written costs more, over the
configuration's own `checkpoint_every`. That Ray starts is not in it, and stands beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

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
from benchmarks.train_box import LatentScenes
from jobs.command_line import InputError, parser, read_config, run, vae_folder
from jobs.ray_session import connect, threads_per_worker
from jobs.ray_training import train_stage
from jobs.tracking import Tracking

#: Rendered scenes that are trained on, at most.
SCENES = 64
#: Steps that warm up and do not count: a worker's heap grows over about so many.
WARM_UP = 10


def stage_of(config: Config, vae: Path, steps: int) -> Stage:
    """The text-only DiT on rendered scenes; Ray's worker builds it by the same call."""
    training = trained(config, steps)
    batch = config.dit.training.batch_size
    source = LatentScenes(config, min(SCENES, batch * steps), vae, "cpu").sized(batch)
    return DitStage(training, source, DitPaths(vae), {})


def bare_steps(config: Config, vae: Path, steps: int) -> list[float]:
    """Seconds of every step of the bare loop."""
    stage = stage_of(config, vae, steps)
    objective, training, device = build_objective(stage), stage.training, torch.device("cpu")
    optimizers, generator = build_optimizers(parameter_groups(objective, training)), torch.Generator()
    clipped, seconds = clipped_parameters(objective), []
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
        seconds.append(time.perf_counter() - begin)
    return seconds[WARM_UP:]


class _Times(QuietReporter):
    """A Reporter that notes when it hears of each step, and the parts of a step as the worker times them."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, float]] = []
        self.parts: list[dict[str, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        if "step_s" in values and step > WARM_UP:
            self.heard.append((step, time.perf_counter()))
            times = {name.removeprefix("time/"): its for name, its in values.items() if name.startswith("time/")}
            self.parts.append({"step_s": values["step_s"], **times})

    def seconds(self) -> tuple[float, float]:
        """Of a step, all that happens between two of them included; and what the checkpoint costs more than that."""
        steps = [after - before for (_, before), (_, after) in pairwise(self.heard)]
        step = statistics.median(steps)
        return step, max(0.0, sum(steps) - step * len(steps))

    def means(self) -> dict[str, float]:
        """Of the parts."""
        return {name: statistics.mean(part[name] for part in self.parts) for name in self.parts[0]}


def ray_run(config: Config, vae: Path, steps: int) -> dict[str, Any]:
    """Seconds of a step through Ray Train and DeepSpeed, and of all that is not a step."""
    times, training = _Times(), trained(config, steps).dit.training
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
    whole, (step, checkpoint) = time.perf_counter() - begin, times.seconds()
    return {
        "step_s": step,
        "checkpoint_s": checkpoint,
        "step_with_its_share_s": step + checkpoint / config.dit.training.checkpoint_every,
        "not_steps_s": whole - step * steps,
        "in_worker": times.means(),
    }


def trained(config: Config, steps: int) -> Config:
    """The text-only DiT for so many steps, with one checkpoint in the middle, and the one at the end."""
    middle = WARM_UP + (steps - WARM_UP) // 2
    return override(text_only(config, steps), [f"dit.training.checkpoint_every={middle}"])


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="training.json")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init of the configuration)")
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--runs", type=int, default=3, help="of bare and of ray, in turn")
    options = flags.parse_args()
    if options.steps < WARM_UP + 2 or options.runs < 1:
        raise InputError(f"--steps {options.steps} --runs {options.runs}: expected at least {WARM_UP + 2} and 1")
    cores = torch.get_num_threads()
    more = ["cluster.num_workers=1", f"cluster.cpus_per_worker={cores}", "dit.training.log_every=1"]
    config = override(read_config(options), more)
    assert threads_per_worker(config) == cores
    vae = vae_folder(options.vae, config)
    # Ray has its workers give way to others, the bare loop does not: on a busy machine that would be measured
    os.environ.setdefault("RAY_worker_niceness", "0")
    bare: list[float] = []
    ray: list[dict[str, Any]] = []
    with connect(config):
        for number in range(options.runs):
            bare.append(statistics.median(bare_steps(config, vae, options.steps)))
            ray.append(ray_run(config, vae, options.steps))
            print(f"{number + 1}/{options.runs}: bare {bare[-1]:.3f} s a step, ray {ray[-1]['step_s']:.3f}", flush=True)
    ratios = [ours["step_with_its_share_s"] / theirs for ours, theirs in zip(ray, bare, strict=True)]
    result = {
        "machine": machine(),
        "config": {
            "name": config.name,
            "batch_size": config.dit.training.batch_size,
            "steps": options.steps,
            "optimizer": config.dit.training.optimizer,
            "checkpoint_every": config.dit.training.checkpoint_every,
        },
        "bare_step_s": bare,
        "ray": ray,
        "ray_over_bare": statistics.median(ratios),
    }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"a step takes {result['ray_over_bare']:.3f} times as long; {options.output}")


if __name__ == "__main__":
    run(main)
