"""Frames shared by two real ranks: the same velocities and gradients as in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from arlon_ray.config import ConfigError, load_config
from arlon_ray.models.dit import STDiT3
from arlon_ray.training.sequence import SequenceParallel
from tests.bundles import small_config
from tests.training.workers import run_workers

CASES = [
    (attention, kind, frames) for attention in ("joint", "temporal") for kind in ("adaptive_norm", "controlnet")
    for frames in (4, 5)
]  # fmt: skip


def outcome(dit: STDiT3, frames: int, masked: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Velocity and gradients at fixed inputs."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = dit.config
    x, coarse = random(2, config.in_channels, frames, 4, 4), random(2, config.in_channels, frames, 4, 4)
    text, mask = random(2, 6, config.caption_channels), torch.ones(2, 6, dtype=torch.bool)
    condition = dit.condition((frames, 4, 4), text, mask, torch.tensor([16.0, 16.0]), (32, 32), coarse)
    noisy = torch.ones(2, frames, dtype=torch.bool)
    noisy[:, 0] = False
    velocity = dit(x, torch.tensor([300.0, 700.0]), condition, noisy if masked else None)
    (velocity * random(*velocity.shape)).sum().backward()
    return velocity.detach(), {name: p.grad.clone() for name, p in dit.named_parameters() if p.grad is not None}


def compared() -> list[tuple[float, float, int]]:
    """On each rank: the largest differences from the whole model's velocity and gradients, and how many of these."""
    found = []
    for attention, kind, frames in CASES:
        config = small_config(f"dit.temporal_attention={attention}", f"dit.injection.kind={kind}").dit
        torch.manual_seed(0)
        dit = STDiT3(config).eval()  # nothing drawn at random
        for parameter in dit.parameters():  # nothing may be hidden behind weights that start at zero
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2 / max(1, parameter.shape[-1]) ** 0.5)
        expected = outcome(dit, frames, masked=frames == 5)
        dit.zero_grad()
        dit.parallel = SequenceParallel()
        velocity, gradients = outcome(dit, frames, masked=frames == 5)
        assert gradients.keys() == expected[1].keys()
        worst = 0.0
        for name, gradient in gradients.items():
            dist.all_reduce(gradient)
            scale = float(expected[1][name].abs().max()) + 1e-6
            worst = max(worst, float((gradient / dist.get_world_size() - expected[1][name]).abs().max()) / scale)
        found.append((float((velocity - expected[0]).abs().max()), worst, len(gradients)))
    return found


def test_velocity_and_gradients_are_those_of_one_process() -> None:
    for outcomes in run_workers(compared, 2):
        for case, (velocity, gradients, count) in zip(CASES, outcomes, strict=True):
            assert velocity < 1e-4 and gradients < 1e-3 and count > 20, (case, velocity, gradients)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sequence_parallel=3 must divide dit\.num_heads=4"):
        load_config("tiny", ["dit.training.sequence_parallel=3"])
