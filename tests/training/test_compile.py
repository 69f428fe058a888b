"""`training.compile` and `checkpointed_share` change how a step is computed, and nothing that is learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import TorchEngine, build_objective, compile_blocks, recompute_blocks
from arlon_ray.training.stages.dit import DitPaths, DitStage, text_only
from tests.bundles import small_config
from tests.training.sources import ToySource


def stage(**settings: Any) -> DitStage:
    """A small text-only DiT."""
    config = text_only(small_config(), 3)
    dit = config.dit.model_copy(update={"training": TrainingConfig(batch_size=4, warmup_steps=1, **settings)})
    config = config.model_copy(update={"dit": dit})
    return DitStage(config, ToySource(config, 4), DitPaths(Path()), {})


def losses(engine: TorchEngine, its: DitStage, steps: int = 3) -> list[tuple[float, float]]:
    """Loss and gradient norm of the first steps."""
    found = []
    for step in range(steps):
        values = engine.step(its.batch(step, 0, 1), torch.Generator().manual_seed(step), 1.0)
        found.append((values["loss"], values["grad_norm"]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is no g++")
@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True, "checkpointed_share": 0.5}])
def test_compiled_steps_are_those_of_plain_torch(more: dict[str, Any]) -> None:
    torch._dynamo.reset()
    plain, compiled = stage(), stage(compile=True, **more)
    expected = losses(TorchEngine(plain), plain)
    engine = TorchEngine(compiled)
    found = losses(engine, compiled)
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4)
    counted = torch._dynamo.utils.counters["stats"]
    assert counted["unique_graphs"] >= 2, "nothing was compiled"
    assert counted["unique_graphs"] <= 8, "blocks of one kind do not share their compilation"
    assert engine.objective.state_dict().keys() == build_objective(plain).state_dict().keys()


@pytest.mark.parametrize("share, expected", [(1.0, 8), (0.5, 4), (0.6, 4), (0.01, 0)])
def test_a_share_of_the_blocks_is_computed_again(share: float, expected: int) -> None:
    config = small_config("dit.depth=4")
    its = DitStage(text_only(config, 3), ToySource(config, 4), DitPaths(Path()), {})
    assert recompute_blocks(build_objective(its), share) == expected


def test_a_frozen_model_is_compiled_whole() -> None:
    objective = build_objective(stage())
    assert compile_blocks(objective) == compile_blocks(objective.requires_grad_(False)) == 4


@pytest.mark.parametrize("more", [{"zero_stage": 3}, {"sequence_parallel": 2}])
def test_what_cannot_be_compiled_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compile=true needs zero_stage 0, 1 or 2 and sequence_parallel=1"):
        TrainingConfig(compile=True, **more)
