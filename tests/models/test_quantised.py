"""AR and DiT with weights of 8 bits, and with products in bfloat16 on a CPU."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arlon_ray import native
from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import DitConfig
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.quantised import Bf16Linear, Int8Linear, in_bf16, quantise, weight_bytes
from arlon_ray.precision import falls_back
from jobs.pack_weights import pack

BOX = Path(__file__).parents[2] / "weights" / "tiny"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The weights in the box, used in int8."""
    return load_bundle(pack(load_bundle(BOX), tmp_path_factory.mktemp("int8") / "bundle", "int8"))


def test_blocks_take_a_quarter_of_float32(packed: Bundle) -> None:
    for small, whole in ((packed.ar, Bundle(BOX).ar), (packed.dit, Bundle(BOX).dit)):
        for name in whole.block_lists:
            blocks, theirs = getattr(small, name), getattr(whole, name)
            assert weight_bytes(blocks) < 0.3 * weight_bytes(theirs)
        linears = [module for module in whole.modules() if isinstance(module, nn.Linear)]
        assert sum(m.weight.numel() for m in linears) > 0.8 * sum(p.numel() for p in whole.parameters())


def test_a_layer_is_what_its_weights_are() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32)
    small, x = Int8Linear(layer), torch.randn(5, 48)
    expected = nn.functional.linear(x, small.weight * small.scale[:, None], layer.bias)
    assert torch.allclose(small(x), expected, atol=1e-5)
    assert torch.allclose(small(x), layer(x), atol=0.02) and not torch.equal(small(x), layer(x))
    zeros = nn.Linear(4, 3)
    nn.init.zeros_(zeros.weight)
    assert torch.equal(Int8Linear(zeros)(torch.ones(1, 4))[0], zeros.bias)


def test_a_quantised_weight_is_off_by_at_most_half_a_level() -> None:
    class Model(nn.Module):
        block_lists = ("blocks",)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(48, 32)])
            self.head = nn.Linear(48, 32)

    model = Model()
    before, head = model.blocks[0].weight.detach().clone(), model.head.weight.detach().clone()
    quantise(model)
    after = model.blocks[0].weight * model.blocks[0].scale[:, None]
    level = before.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(before, after) and ((before - after).abs() <= level * 0.51).all()
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("temporal", ["temporal", "joint"])
@pytest.mark.parametrize("kind", ["int8", "int8 in bf16", "bf16"])
def test_a_dit_is_nearly_the_same(monkeypatch: pytest.MonkeyPatch, kind: str, temporal: str, plainly: bool) -> None:
    if kind == "bf16" and falls_back("bf16", "cpu"):
        pytest.skip("this CPU has no bfloat16")
    asked: list[bool] = []

    def library() -> ctypes.CDLL | None:
        asked.append(True)
        return None if plainly else built

    built = native.library()
    monkeypatch.setattr(native, "library", library)
    config = DitConfig(
        depth=2, hidden_size=48, num_heads=2, in_channels=4, caption_channels=16, model_max_length=7,
        temporal_attention=temporal, input_sq_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    dit = STDiT3(config).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, text = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 7, 16)

    @torch.no_grad()
    def velocity() -> torch.Tensor:
        condition = dit.condition((5, 8, 8), text, (7, 4), torch.tensor([16.0, 24.0]), (64, 64), x)
        return dit(x, torch.tensor([300.0, 900.0]), condition)

    expected = velocity()
    assert asked
    in_bf16(dit) if kind == "bf16" else quantise(dit, torch.bfloat16 if "in" in kind else None)
    found = velocity()
    assert found.dtype is torch.float32 and 1e-5 < (found - expected).norm() / expected.norm() < 0.02


@pytest.mark.skipif(falls_back("bf16", "cpu"), reason="this CPU has no bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_bf16_are_those_of_torch(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 32, bias), torch.randn(3, 7, 48)
    expected = nn.functional.linear(*(t if t is None else t.bfloat16() for t in (x, layer.weight, layer.bias))).float()
    found = Bf16Linear(layer)(x)
    assert found.dtype is torch.float32 and torch.allclose(found, expected, rtol=2**-7, atol=1e-3)
    half = Bf16Linear(layer)
    half(x)
    assert torch.equal(copy.deepcopy(half)(x), found) and weight_bytes(half) == 2 * sum(
        p.numel() for p in layer.parameters()
    )
    with FlopCounterMode(display=False) as counter:
        assert torch.allclose(half(x), found, rtol=2**-7, atol=1e-3)
    assert counter.get_total_flops() == 2 * 21 * 48 * 32


@pytest.mark.skipif(falls_back("bf16", "cpu"), reason="this CPU has no bfloat16")
def test_on_a_cpu_a_bundle_in_bf16_keeps_its_activations(tmp_path: Path) -> None:
    whole, small = Bundle(BOX), load_bundle(pack(load_bundle(BOX), tmp_path / "bundle", "bf16"))
    assert small.dit.final_layer.linear.weight.dtype is small.ar.head.weight.dtype is torch.float32
    assert any(isinstance(module, Bf16Linear) for module in small.dit.modules())
    rounded = small.ar.head.weight
    assert torch.equal(rounded, whole.ar.head.weight.bfloat16().float())
    options = default_options(whole.config.sampling, steps=3)
    tokens = next(VideoGenerator(whole).planner.plan(["a red circle"], 1, options)).tokens  # type: ignore[union-attr]
    clean, found = (
        VideoGenerator(bundle).renderer.render("a red circle", tokens, None, 1, 0, options).latents
        for bundle in (whole, small)
    )
    assert 0 < np.linalg.norm(found - clean) / np.linalg.norm(clean) < 0.05


def test_videos_are_nearly_the_same_and_the_bundle_is_another(packed: Bundle) -> None:
    whole = Bundle(BOX)
    assert packed.fingerprint != whole.fingerprint and packed.config.precision == "int8"
    prompts = ["a red circle moves to the right"]
    options = default_options(whole.config.sampling, steps=3)
    tokens = next(VideoGenerator(whole).planner.plan(prompts, 1, options)).tokens  # type: ignore[union-attr]
    clean, coarse = (
        VideoGenerator(bundle).renderer.render(prompts[0], tokens, None, 1, 0, options).latents
        for bundle in (whole, packed)
    )
    error = np.linalg.norm(coarse - clean) / np.linalg.norm(clean)
    assert 0 < error < 0.05
    assert next(iter(VideoGenerator(packed).generate(prompts, 1, options))).shape == (34, 64, 64, 3)
