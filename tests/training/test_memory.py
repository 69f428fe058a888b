"""The plan of memory beside what a process takes; what ZeRO splits; what cannot be planned."""

from __future__ import annotations

import pytest

from arlon_ray.config import load_config
from arlon_ray.training.memory import plan_memory, probe_of, step_flops
from benchmarks.memory import compare
from tests.bundles import small_config


@pytest.mark.parametrize(
    "case",
    [
        ("dit", 12, False),
        *(pytest.param(case, marks=pytest.mark.slow) for case in (("dit", 12, True), ("ar", 16, False))),
    ],
)
def test_the_plan_is_what_a_process_takes(case: tuple[str, int, bool]) -> None:
    assert compare("tiny", *case)["ratio"] == pytest.approx(1, abs=0.15)


def test_each_stage_of_zero_splits_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arlon_ray.training.memory._followed", lambda *_: (1000, 0))
    plans = [plan_memory(load_config("tiny", [f"dit.training.zero_stage={zero}"]), "dit", 2) for zero in range(4)]
    assert plans[0].optimizer > plans[1].optimizer == plans[2].optimizer
    assert plans[0].average == 2 * plans[1].average
    assert plans[1].gradients > plans[2].gradients == plans[3].gradients
    assert plans[2].parameters > plans[3].parameters
    offloaded = plan_memory(
        load_config("tiny", ["dit.training.optimizer=adamw", "dit.training.offload_optimizer=true"]), "dit", 2
    )
    assert offloaded.optimizer == 0 and offloaded.offloaded > plans[1].optimizer


def test_smaller_parts_of_a_batch_need_less() -> None:
    whole, parts, shared, again = (
        plan_memory(small_config("dit.depth=2", f"dit.training.{setting}"), "dit", 2).activations
        for setting in ("accumulation=1", "accumulation=4", "sequence_parallel=2", "activation_checkpointing=true")
    )
    assert parts == pytest.approx(whole / 4, rel=0.1) and again < whole / 2
    assert shared == pytest.approx(whole, rel=0.1)  # twice the samples, half of the frames


@pytest.mark.slow
def test_a_deep_model_is_reckoned_from_shallow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("dit.depth=6")
    monkeypatch.setattr("arlon_ray.training.memory.SHALLOW", (2, 4))
    reckoned = plan_memory(config, "dit", 2).activations
    monkeypatch.setattr("arlon_ray.training.memory.SHALLOW", (6, 6))
    assert reckoned == pytest.approx(plan_memory(config, "dit", 2).activations, rel=0.02)


def test_flops_of_a_step_are_three_forwards_of_each_sample() -> None:
    config = small_config("ar.training.batch_size=4")
    forward = sum(p.numel() for p in probe_of(config, "ar", 1).model.blocks.parameters())  # type: ignore[union-attr]
    tokens = config.text.max_tokens + 1  # and the visual ones, whose number is below
    found = step_flops(config, "ar") / 4
    assert found > 6 * forward * tokens
    assert step_flops(small_config("ar.training.batch_size=8"), "ar") == 2 * 4 * found
    again = small_config("ar.training.batch_size=4", "ar.training.activation_checkpointing=true")
    assert step_flops(again, "ar") == 4 * found


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="stage text: expected one of vae, vqvae_fine"):
        plan_memory(load_config("tiny"), "text", 1)
