"""The formulas that the DiT is measured against are Open-Sora's, and those of the project."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arlon_ray.config import DitConfig, InjectionConfig
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.dit import STDiT3
from benchmarks.plain_opensora import forward, guided_step
from tests.models.test_dit import GOLDEN, PREFIX, needs_golden, public_model


@needs_golden
@pytest.mark.parametrize("masked", [False, True])
def test_it_gives_what_the_public_model_gives(masked: bool) -> None:
    io, model = load_file(Path(GOLDEN) / f"{PREFIX}stdit3_io.safetensors"), public_model(False)
    size, expected = (int(io["height"][0]), int(io["width"][0])), io["out_x_mask" if masked else "out"]
    for i in range(len(expected)):  # their texts differ in length
        x, time, text, mask, fps, noisy = (
            io[name][i : i + 1] for name in ("x", "timestep", "y", "mask", "fps", "x_mask")
        )
        with torch.no_grad():
            out = forward(model, x, time, text[:, 0], mask.bool(), fps, size, noisy.bool() if masked else None)
        assert (out - expected[i]).abs().max() < 1e-4


@pytest.mark.parametrize("attention", ["temporal", "joint"])
@pytest.mark.parametrize("given, guided", [(0, True), (2, True), (2, False)])
def test_a_guided_step_equals_that_of_the_project(attention: str, given: int, guided: bool) -> None:
    torch.manual_seed(0)
    config = DitConfig(
        depth=2, hidden_size=32, num_heads=2, caption_channels=8, model_max_length=6, temporal_attention=attention,
        injection=InjectionConfig(enabled=True, width=16),
    )  # fmt: skip
    dit = STDiT3(config).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        if "freqs" not in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, text = torch.randn(1, 4, 5, 6, 5), (torch.randn(1, 6, 8), torch.arange(6)[None] < 4)
    noisy, time = torch.arange(5)[None] >= given, torch.tensor([700.0])
    coarse = torch.randn_like(x) if guided else None
    options = GenerationOptions(guidance_scale=7.0)
    ours = guided_velocity(dit, (5, 6, 5), text, coarse, noisy, 24.0, (48, 40), options)(x, time)
    plain = guided_step(dit, x, time, text, 24.0, (48, 40), 7.0, noisy, coarse)
    assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    if guided:
        without = guided_step(dit, x, time, text, 24.0, (48, 40), 7.0, noisy)
        assert (plain - without).abs().max() > 1e-2
