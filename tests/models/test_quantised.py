"""AR and DiT with weights of 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.models.quantised import Int8Linear, quantise, weight_bytes
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
    expected = nn.functional.linear(x, small.in_full(), layer.bias)
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
    after = model.blocks[0].in_full()
    level = before.abs().amax(1, keepdim=True) / 127
    assert not torch.equal(before, after) and ((before - after).abs() <= level * 0.51).all()
    assert torch.equal(model.head.weight, head)


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
