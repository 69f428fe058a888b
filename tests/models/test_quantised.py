"""AR and DiT with weights of 8 bits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arlon_ray.artifact import ArtifactError
from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.models.quantised import quantise, weight_bytes
from jobs.pack_weights import pack
from tests.bundles import make_random_bundle

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
    after = model.blocks[0].weight.dequantize()
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


def test_without_torchao_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    bundle = load_bundle(make_random_bundle(tmp_path / "bundle", "precision=int8"))
    with pytest.raises(ArtifactError, match=r"needs torchao: pip install 'arlon-ray\[int8\]'"):
        _ = bundle.dit
