"""Counts beside torch's own counter on the real modules, and what makes them grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arlon_ray.config import Config, load_config
from arlon_ray.models.text import load_text_encoder
from arlon_ray.planning import counts, training
from arlon_ray.training.memory import step_flops, training_of
from arlon_ray.training.optimizer import build_optimizers, parameter_groups
from tests.bundles import small_config

TEXT, ROWS = 7, 3


def counted(make: Callable[[], Callable[[], Any]]) -> int:
    """Operations of what `make` gives, of shapes alone."""
    # the counter knows nothing of the CPU's fused attention
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call, counter = make(), FlopCounterMode(display=False)
        with counter:
            call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("tiny", ()),
        ("tiny", ("dit.injection.kind=mlp_adapter", "dit.injection.layers=all")),
        ("tiny", ("dit.injection.kind=controlnet", "dit.temporal_attention=temporal")),
        ("small", ()),
    ],
)
def test_the_dit_is_counted_as_torch_counts_it(preset: str, settings: tuple[str, ...]) -> None:
    config = load_config(preset, settings)
    latent = (config.segment.latents, *config.latent_grid)
    grid = counts.dit_grid(config, config.segment.groups)

    def prepared() -> tuple[Any, Callable[[], Any], torch.Tensor]:
        dit = training._BUILD["dit"](config)
        coarse = torch.empty(ROWS, config.dit.in_channels, *latent)
        size = (config.video.height, config.video.width)
        text = torch.empty(ROWS, TEXT, config.text.dim)
        return dit, lambda: dit.condition(latent, text, None, torch.empty(ROWS), size, coarse), coarse

    def step() -> Callable[[], Any]:
        dit, prepare, x = prepared()
        condition = prepare()
        return lambda: dit(x, torch.empty(ROWS), condition, torch.ones(ROWS, latent[0], dtype=torch.bool))

    assert counts.dit_condition(config.dit, *grid, TEXT, ROWS).flops == counted(lambda: prepared()[1])
    assert counts.dit_forward(config.dit, *grid, TEXT, ROWS, inputs=ROWS).flops == counted(step)


@pytest.mark.parametrize(("preset", "block"), [("tiny", "[1,1]"), ("tiny", "[2,4]"), ("small", "[4,4]")])
def test_the_ar_is_counted_as_torch_counts_it(preset: str, block: str) -> None:
    config = load_config(preset, [f"ar.block={block}"])
    grid = config.token_grid(config.vqvae.fine, 2)

    def forward() -> Callable[[], Any]:
        ar, tokens = training._BUILD["ar"](config), torch.zeros(1, *grid, dtype=torch.int64)
        text = torch.empty(1, TEXT, config.text.dim), torch.ones(1, TEXT, dtype=torch.bool)
        return lambda: ar(*text, tokens)

    assert counts.ar_forward(config, 2, TEXT).flops == counted(forward)


def test_a_step_of_the_ar_is_a_position_of_its_forward_pass() -> None:
    config = small_config("ar.block=[1,1]", "sampling.ar_guidance_scale=1.0")
    step = counts.ar_segment(config, TEXT).step
    one = counts.ar_trunk(config.ar, 1, 0) + counts.ar_head(config.ar, config.vqvae.fine.codebook_size, 1)
    assert step.products == one.products
    guided = counts.ar_segment(small_config("ar.block=[1,1]", "sampling.ar_guidance_scale=2.0"), TEXT).step
    assert guided.products == 2 * step.products and guided.calls == step.calls
    # weights are read once for both rows
    assert step.traffic < guided.traffic < 2 * step.traffic


@pytest.mark.parametrize("stage", ["vae", "vqvae_fine", "vqvae_coarse", "ar", "dit"])
def test_training_is_three_forwards_but_for_gradients_that_nobody_needs(stage: str) -> None:
    config = load_config("tiny")
    counted_here = training.sample_work(config, stage).flops
    assert step_flops(config, stage) / training_of(config, stage).batch_size == pytest.approx(counted_here, rel=0.06)


@pytest.mark.parametrize("stage", ["vae", "ar", "dit"])
def test_muon_is_counted_as_torch_counts_it(stage: str) -> None:
    config = small_config("dit.hidden_size=64")
    model = training.stage_model(config, stage).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    counter = FlopCounterMode(display=False)
    with counter:
        for optimizer in build_optimizers(parameter_groups(model, training_of(config, stage))):
            optimizer.step()
    assert training.optimizer_work(config, stage).flops == counter.get_total_flops() > 0


def test_the_text_encoder_has_the_weights_that_are_counted() -> None:
    config = load_config("tiny")
    encoder = load_text_encoder(config.text)
    matrices = [p for name, p in encoder.model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    layers = sum(p.numel() for p in matrices)
    work = counts.text_caption(config.text, TEXT)
    assert work.products == 2 * TEXT * layers and work.calls == config.text.layers


def test_more_of_anything_is_more_work() -> None:
    plain = load_config("tiny")

    def of(config: Config) -> list[float]:
        grid = counts.dit_grid(config, config.segment.groups)
        return [
            counts.dit_forward(config.dit, *grid, TEXT, 1).flops,
            counts.ar_segment(config, TEXT).all.flops,
            counts.vae_group(config, encode=False).flops,
            counts.codec_group(config, "fine", encode=True).flops,
        ]

    wider = of(load_config("tiny", ["video.width=128"]))
    assert all(more > less for more, less in zip(wider, of(plain), strict=True))
    deeper = of(load_config("tiny", ["dit.depth=6", "ar.layers=8", "vae.blocks=6", "vqvae.fine.blocks=4"]))
    assert all(more > less for more, less in zip(deeper, of(plain), strict=True))


def test_branches_of_guidance_are_rows() -> None:
    def rows(*settings: str, first: bool = True) -> int:
        return counts.branches(load_config("tiny", [f"sampling.{setting}" for setting in settings]), first)

    assert rows("guidance_scale=1.0") == 1
    assert rows("guidance_scale=2.0") == 2
    assert rows("guidance_scale=2.0", "token_guidance_scale=2.0") == 3
    assert rows("guidance_scale=2.0", "token_guidance_scale=2.0", "baseline=true") == 2
    # where its text goes on
    later = ("guidance_scale=2.0", "token_guidance_scale=2.0")
    shares = [(*later, f"continued_guidance={share}") for share in (0, 0.5, 1)]
    assert [rows(*settings, first=False) for settings in shares] == [2, 3, 3]
    assert rows(*shares[0], "baseline=true", first=False) == 2
