"""What making videos is reckoned to hold, beside what operations on real tensors hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from arlon_ray.config import GROUP_LATENTS, load_config
from arlon_ray.evaluation.cost import most_bytes
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.quantised import quantise, weight_bytes
from arlon_ray.models.vae import build_vae
from arlon_ray.planning import memory
from arlon_ray.planning.memory import inference_memory, resident, served
from tests.bundles import small_config

H100 = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu_h100.json"


@torch.no_grad()
def test_a_step_of_the_dit_holds_what_was_reckoned() -> None:
    config = load_config("tiny")
    dit = STDiT3(config.dit).eval().requires_grad_(False)
    latent, rows, length = (config.segment.latents, *config.latent_grid), 2, config.text.max_tokens

    def step() -> object:
        x = torch.zeros(rows, config.dit.in_channels, *latent)
        text, size = torch.zeros(rows, length, config.text.dim), (config.video.height, config.video.width)
        condition = dit.condition(latent, text, (length,) * rows, torch.zeros(rows), size, x)
        return dit(x, torch.zeros(rows), condition, torch.ones(rows, latent[0], dtype=torch.bool))

    part = inference_memory(config, "fp32")["dit"]
    assert part.weights == weight_bytes(dit)
    assert part.working == pytest.approx(most_bytes(step), rel=0.1)
    assert inference_memory(config, "int8")["dit"].weights == weight_bytes(quantise(dit.bfloat16()))


@torch.no_grad()
def test_decoding_holds_what_was_reckoned() -> None:
    config = load_config("tiny")
    vae = build_vae(config.vae).eval()
    latents = torch.zeros(1, config.vae.latent_channels, config.segment.groups * GROUP_LATENTS, *config.latent_grid)
    part = inference_memory(config, "fp32")["vae"]
    assert part.weights == weight_bytes(vae)
    assert part.working == pytest.approx(most_bytes(lambda: vae.decode(latents)), rel=0.1)


def test_a_deep_dit_is_reckoned_from_shallow_ones() -> None:
    config = small_config("dit.depth=12")
    reckoned = inference_memory(config, "bf16")["dit"].working
    assert reckoned == memory._dit_working(config, "bf16", torch.bfloat16, config.text.max_tokens)


@pytest.mark.slow
def test_an_h100_held_what_is_reckoned() -> None:
    measured = json.loads(H100.read_text())["cases"]["sampling, 240p"]["memory_gib"]["ours"]
    config = load_config("opensora-v1.2", ["video.height=240", "video.width=424", "segment.groups=3"])
    # `benchmarks.gpu_sampling`: captions of a third of the longest
    part = memory._dit(config, "bf16", torch.bfloat16, config.text.max_tokens // 3)
    assert part.total / 2**30 == pytest.approx(measured, rel=0.05)


def test_idle_parts_that_are_offloaded_leave_room() -> None:
    parts = inference_memory(small_config(), "fp32")
    assert set(parts) == {"text", "ar", "codec", "dit", "vae"}
    assert max(part.total for part in parts.values()) == resident(parts, True) < resident(parts, False)
    alone = small_config("serve.ar.max_batch=1", "serve.dit.max_batch=1").serve
    service, without = served(parts, alone), served(parts, alone, text_on_cpu=True)
    saved = parts["text"].weights
    assert [service[name] - without[name] >= saved for name in ("ar", "dit", "decoder")] == [True, True, False]
    assert without["ar"] == parts["codec"].weights + parts["ar"].weights + max(
        parts[p].working for p in ("codec", "ar")
    )
    many = served(parts, small_config("serve.ar.max_batch=1", "serve.dit.max_batch=9").serve)
    grown = {name: many[name] - size for name, size in service.items()}
    assert (
        grown["ar"] == grown["decoder"] == 0 and 0 < 9 * parts["dit"].working - grown["dit"] < 2 * parts["dit"].working
    )
    halved = inference_memory(small_config(), "bf16")
    assert halved["dit"].weights < parts["dit"].weights and halved["vae"] == parts["vae"]
    text_only = inference_memory(small_config("sampling.baseline=true"), "fp32")
    assert set(text_only) == {"text", "dit", "vae"} and set(served(text_only, alone)) == {"dit", "decoder"}
