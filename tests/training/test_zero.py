"""DeepSpeed's stages of ZeRO with two real workers, beside plain PyTorch in one; any state goes on anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import Stage, TorchEngine, build_objective, derived_seed, recompute_blocks
from arlon_ray.training.loop import run_stage
from arlon_ray.training.optimizer import (
    build_optimizers,
    clipped_parameters,
    learning_rate_scale,
    parameter_groups,
    set_learning_rates,
)
from arlon_ray.training.stages.dit import DitPaths, DitStage
from tests.bundles import make_random_parts, small_config
from tests.training.recording import Recorder
from tests.training.regression_stage import regression_stage
from tests.training.sources import ToySource
from tests.training.workers import run_workers

WORLD, STEPS = 2, 5
TRAINING = {
    "steps": STEPS, "batch_size": 8, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 3, "precision": "fp32",
    "held_out": 4, "learning_rate": 2e-3, "muon_learning_rate": 0.01, "clip_norm": 0.05, "weight_decay": 0.01,
    "ema_decay": 0.9,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{f"adamw, stage {zero}": {"optimizer": "adamw", "zero_stage": zero} for zero in range(4)},
    **{f"muon, stage {zero}": {"optimizer": "muon", "zero_stage": zero} for zero in range(4)},
    **{f"offloaded, stage {zero}": {"zero_stage": zero, "offload_optimizer": True} for zero in (2, 3)},
    **{f"recomputed, stage {zero}": {"zero_stage": zero, "activation_checkpointing": True} for zero in (1, 3)},
    "bf16, stage 3": {"zero_stage": 3, "precision": "bf16"},
}  # fmt: skip


class Outcome(NamedTuple):
    """Losses and gradient norms of all steps, and the artefact's weights (those of rank 0)."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


class SharedCheckpoints:
    """Checkpoints of several workers in one folder: every rank writes its files into the same place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float], *, wait: bool) -> Path:
        target = self.folder / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        fill(target)
        if dist.is_initialized():
            dist.barrier()
        return target


def dit_stage(parts: dict[str, Path], settings: dict[str, Any]) -> Stage:
    """A small guided DiT with all that a real one has."""
    config = small_config()
    dit = config.dit.model_copy(update={"training": TrainingConfig(**{**TRAINING, **settings})})
    paths = DitPaths(parts["vae"], parts["codec_fine"], parts["codec_coarse"])
    return DitStage(config.model_copy(update={"dit": dit}), ToySource(config, 8), paths, {})


def train(stage: Stage, engine: Any, folder: Path, output: Path) -> Outcome:
    """To the end, from the newest checkpoint in `folder`."""
    recorder = Recorder()
    result = run_stage(stage, engine, recorder, output=output, checkpoints=SharedCheckpoints(folder))
    values = [recorder.values[step] for step in sorted(recorder.values)]
    weights = result.artifact.tensors() if result.artifact else {}
    return Outcome(
        [v["loss"] for v in values if "loss" in v], [v["grad_norm"] for v in values if "grad_norm" in v], weights
    )


def all_cases(parts: dict[str, Path], folder: Path) -> dict[str, Any]:
    """In every worker: the outcomes of `CASES`, and those of what went on here of `MOVES`."""
    from jobs.deepspeed_engine import DeepSpeedEngine

    found = {}
    for number, (name, settings) in enumerate(CASES.items()):
        stage = dit_stage(parts, settings)
        engine = DeepSpeedEngine(stage, torch.device("cpu"))
        found[name] = train(stage, engine, folder / f"case-{number}", folder / f"case-out-{number}")
    stage = dit_stage(parts, SHARED)
    found["shared"] = train(stage, engine_of(stage, 1), folder / "shared", folder / "shared-out")
    for number in range(len(MOVES)):
        half(number, folder, begin=True)
    found["moves"] = [half(number, folder, begin=False) for number in range(len(MOVES))]
    return found


def plainly(stage: Stage) -> Outcome:
    """The same steps in one process: the gradients of both workers' shares, summed by hand."""
    objective, training, generator = build_objective(stage), stage.training, torch.Generator()
    optimizers = build_optimizers(parameter_groups(objective, training))
    averages = {name: value.detach().clone() for name, value in objective.named_parameters() if value.requires_grad}
    losses, norms = [], []
    for step in range(STEPS):
        objective.zero_grad()
        found = []
        for rank in range(WORLD):
            generator.manual_seed(derived_seed(stage.seed, stage.name, step, rank))
            loss = objective(stage.batch(step, rank, WORLD), generator).loss
            (loss / WORLD).backward()
            found.append(loss.item())
        losses.append(sum(found) / WORLD)
        norms.append(float(nn.utils.clip_grad_norm_(clipped_parameters(objective), training.clip_norm)))
        for optimizer in optimizers:
            set_learning_rates(optimizer.param_groups, learning_rate_scale(step, training))
            optimizer.step()
        decay = min(training.ema_decay, (1 + step) / (10 + step))
        for name, value in objective.named_parameters():
            if name in averages:
                averages[name].lerp_(value.detach(), 1 - decay)
    weights = {name.removeprefix("dit."): value for name, value in averages.items() if name.startswith("dit.")}
    return Outcome(losses, norms, weights)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_random_parts(tmp_path_factory.mktemp("parts"), small_config())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def found(parts: dict[str, Path], folder: Path) -> dict[str, Any]:
    for number in range(len(MOVES)):
        half(number, folder, begin=True)
    return run_workers(all_cases, WORLD, parts, folder)[0]


@pytest.fixture(scope="module")
def expected(parts: dict[str, Path]) -> dict[str, Outcome]:
    return {kind: plainly(dit_stage(parts, {"optimizer": kind})) for kind in ("adamw", "muon")}


@pytest.mark.parametrize("case", CASES)
def test_every_stage_agrees_with_plain_pytorch(case: str, found: dict[str, Any], expected: dict[str, Outcome]) -> None:
    ours, theirs = found[case], expected[CASES[case].get("optimizer", "adamw")]
    coarse = CASES[case].get("precision") == "bf16"
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-2 if coarse else 1e-5)
    assert ours.norms == pytest.approx(theirs.norms, rel=0.1 if coarse else 1e-3)
    assert len(theirs.losses) == STEPS and theirs.losses[-1] < theirs.losses[0]
    if not coarse:
        for name, value in theirs.weights.items():
            assert torch.allclose(ours.weights[name], value, rtol=0, atol=2e-5), name


#: Both workers share the frames of every sample.
SHARED = {"sequence_parallel": 2, "zero_stage": 1}


def test_frames_shared_by_workers_train_the_same(found: dict[str, Any], parts: dict[str, Path], tmp_path: Path) -> None:
    stage = dit_stage(parts, SHARED)
    alone = train(stage, TorchEngine(stage), tmp_path / "checkpoints", tmp_path / "out")
    assert found["shared"].losses == pytest.approx(alone.losses, rel=1e-5)
    assert found["shared"].norms == pytest.approx(alone.norms, rel=1e-3)
    for name, value in alone.weights.items():
        assert torch.allclose(found["shared"].weights[name], value, rtol=0, atol=2e-5), name


#: (optimizer, stages of ZeRO that two workers begin and go on with; None: plain PyTorch in one process).
MOVES = [
    ("adamw", 1, None), ("adamw", None, 3), ("adamw", 3, 2),
    ("muon", 2, None), ("muon", None, 3), ("muon", 3, 0), ("muon", 0, 1),
]  # fmt: skip
HALF = 6
REGRESSION = {**TRAINING, "schedule": "constant", "learning_rate": 0.01, "steps": 2 * HALF}


def half(number: int, folder: Path, begin: bool) -> Outcome | None:
    """The first or the second half of `MOVES[number]`, here; None if it is for others."""
    optimizer, *zeros = MOVES[number]
    zero = zeros[0 if begin else 1]
    if (zero is None) == dist.is_initialized():
        return None
    settings = {**REGRESSION, "optimizer": optimizer, "zero_stage": zero or 0, "steps": HALF if begin else 2 * HALF}
    stage = regression_stage(settings, dropout=0.0, noise=0.0)
    output = folder / f"out-{number}-{begin}"
    return train(stage, engine_of(stage, zero), folder / f"checkpoints-{number}", output)


def engine_of(stage: Stage, zero: int | None) -> Any:
    """The engine that a half runs on."""
    if zero is None:
        return TorchEngine(stage)
    from jobs.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(stage, torch.device("cpu"))


def test_a_state_goes_on_with_other_workers_and_another_stage(found: dict[str, Any], folder: Path) -> None:
    for number, (optimizer, *_) in enumerate(MOVES):
        ours = found["moves"][number] or half(number, folder, begin=False)
        stage = regression_stage({**REGRESSION, "optimizer": optimizer}, dropout=0.0, noise=0.0)
        whole = train(stage, TorchEngine(stage), folder / f"whole-{number}", folder / f"whole-out-{number}")
        assert ours.losses == pytest.approx(whole.losses[HALF:], rel=1e-4), MOVES[number]
        for name in set(whole.weights) - {"seen"}:
            assert torch.allclose(ours.weights[name], whole.weights[name], atol=1e-5), (MOVES[number], name)


def test_blocks_computed_again_need_less_memory(parts: dict[str, Path]) -> None:
    stage = dit_stage(parts, {})
    sizes, gradients = [], []
    for again in (False, True):
        objective = build_objective(stage)
        if again:
            assert recompute_blocks(objective) == 2 * stage.config.dit.depth  # type: ignore[attr-defined]
        kept: list[int] = []

        def note(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(stage.batch(0, 0, 1), torch.Generator().manual_seed(0)).loss
        sizes.append(sum(kept))
        loss.backward()
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
    assert sizes[1] < 0.7 * sizes[0]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(value, gradients[1][name], atol=1e-6) for name, value in gradients[0].items())
