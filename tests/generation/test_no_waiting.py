"""The loops of DiT and AR never ask the device for a number: on the meta device, which has none, they run through."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from arlon_ray.config import ArConfig, DitConfig, InjectionConfig
from arlon_ray.diffusion.solvers import SOLVERS, FlowPath, Solver
from arlon_ray.generation.decoder import Decoder, Layout
from arlon_ray.generation.guidance import StepCache, Together, guided_velocity, velocities
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.dit import STDiT3

SHAPE = (10, 4, 4)
META = torch.device("meta")


def test_a_number_that_is_asked_for_is_noticed() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(torch.zeros((), device=META))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=META).cpu()


@torch.no_grad()
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("attention", ["temporal", "joint"])
def test_steps_of_the_dit(solver: Solver, attention: Literal["temporal", "joint"]) -> None:
    """With text and token guidance, given frames and cached layers, of two segments in one batch."""
    dit = STDiT3(
        DitConfig(
            depth=3, hidden_size=64, num_heads=4, caption_channels=16, model_max_length=6,
            temporal_attention=attention, injection=InjectionConfig(enabled=True, width=32),
        )
    ).to(META).eval()  # fmt: skip
    x, coarse = (torch.zeros(1, dit.config.in_channels, *SHAPE, device=META) for _ in range(2))
    noisy = torch.ones(1, SHAPE[0], dtype=torch.bool, device=META)
    text = torch.zeros(1, 6, 16, device=META), torch.arange(6)[None] < 4  # of the mask it reads the length, once
    options = GenerationOptions(guidance_scale=3.0, token_guidance_scale=2.0)
    fields = [guided_velocity(dit, SHAPE, text, coarse, noisy, 24.0, (32, 32), options) for _ in range(2)]
    paths = [FlowPath(x, [900.0, 600.0, 300.0], (noisy, x), solver) for _ in fields]
    caches, together = [StepCache(1, 2) for _ in fields], Together(fields)
    while not paths[0].ended:
        lates = [cache.at(path.evaluations, 3) for cache, path in zip(caches, paths, strict=True)]
        made = velocities(together, [path.x for path in paths], [path.time_B for path in paths], lates)
        for path, velocity in zip(paths, made, strict=True):
            path.advance(velocity)
    assert paths[1].ended and paths[1].x.shape == x.shape


@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_steps_of_the_ar(block: tuple[int, int], scale: float) -> None:
    """Two members, with a top-k and guidance or without."""
    model = ArTransformer(ArConfig(dim=64, layers=2, heads=2, block=block), codebook_size=64, text_dim=8, max_text=6)
    decoder = Decoder(model.to(META).requires_grad_(False).eval(), 40, 2, by_index=True, fused=False)
    options = [GenerationOptions(ar_guidance_scale=scale, top_k=top_k) for top_k in (0, 9)]
    owners, first, away = ([0, 0, 1, 1], [0, 2], [1, 3]) if scale != 1.0 else ([0, 1], [0, 1], [0, 1])
    decoder.layout = Layout(owners, first, away, options)
    for _ in range(2):
        decoder.draw()
        decoder.advance(7, [])
    assert decoder.state.shape[1] == 64
