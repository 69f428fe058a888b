"""STDiT3 and its injection. That it computes what Open-Sora v1.2 does is shown in tests/opensora/test_check.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arlon_ray.config import DitConfig, InjectionConfig
from arlon_ray.models.dit import STDiT3

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
PREFIX = "opensora_v1_2_"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="Open-Sora's numbers are not beside this checkout")


def public_model(injection: bool) -> STDiT3:
    config = json.loads((GOLDEN / f"{PREFIX}stdit3_config.json").read_text())
    model = STDiT3(DitConfig(**config, injection=InjectionConfig(enabled=injection, width=16))).eval()
    state = load_file(GOLDEN / f"{PREFIX}stdit3_state.safetensors")
    missing = model.load_state_dict(state, strict=not injection).missing_keys
    assert all(name.startswith("injection.") for name in missing)
    return model


def forward(model: STDiT3, io: dict[str, torch.Tensor], noisy: torch.Tensor | None, coarse: torch.Tensor | None):
    size = (float(io["height"][0]), float(io["width"][0]))
    condition = model.condition(tuple(io["x"].shape[2:]), io["y"][:, 0], io["mask"].bool(), io["fps"], size, coarse)
    with torch.no_grad():
        return model(io["x"], io["timestep"], condition, noisy)


@needs_golden
def test_untrained_injection_leaves_the_base_exactly_as_it_is() -> None:
    io = load_file(GOLDEN / f"{PREFIX}stdit3_io.safetensors")
    coarse = torch.randn(io["x"].shape, generator=torch.Generator().manual_seed(0))
    plain = forward(public_model(False), io, None, None)
    injected = public_model(True)
    assert torch.equal(forward(injected, io, None, coarse), plain)
    with torch.no_grad():
        injected.injection.layers["0"].out.bias.add_(0.5)
    assert not torch.allclose(forward(injected, io, None, coarse), plain)


@pytest.mark.parametrize("kind, exit", [
    ("adaptive_norm", "layers.0.out.bias"), ("mlp_adapter", "layers.0.out.bias"), ("controlnet", "branch.exits.0.bias"),
])  # fmt: skip
def test_every_kind_of_injection_starts_as_the_base_and_is_gated_by_the_sample(kind: str, exit: str) -> None:
    base, model = small(injection=InjectionConfig(enabled=False)), small_injected(kind)
    x, text, fps = torch.randn(2, 4, 5, 4, 4), torch.randn(2, 6, 8), torch.tensor([16.0, 16.0])
    keep = torch.tensor([True, False])

    def run(dit: STDiT3, coarse: torch.Tensor | None) -> torch.Tensor:
        with torch.no_grad():
            condition = dit.condition((5, 4, 4), text, None, fps, (32, 32), coarse, None if coarse is None else keep)
            return dit(x, torch.tensor([500.0, 500.0]), condition)

    plain, coarse = run(base, None), torch.randn(2, 4, 5, 4, 4)
    assert torch.allclose(run(model, coarse), plain, atol=1e-6)
    dict(model.injection.named_parameters())[exit].data.add_(0.5)
    if kind == "adaptive_norm":  # of its gate, scale and bias the gate alone opens it
        assert dict(model.injection.named_parameters())[exit].shape == (96,)
    guided = run(model, coarse)
    assert not torch.allclose(guided[0], plain[0], atol=1e-3) and torch.allclose(guided[1], plain[1], atol=1e-6)
    assert torch.allclose(run(model, None), plain, atol=1e-6)


def small_injected(kind: str) -> STDiT3:
    """The model of `small` with untrained injection, begun as training begins it."""
    base = small(injection=InjectionConfig(enabled=False))
    torch.manual_seed(1)
    model = STDiT3(base.config.model_copy(update={"injection": InjectionConfig(kind=kind, width=16)})).eval()  # type: ignore[arg-type]
    model.load_state_dict(base.state_dict(), strict=False)
    model.copy_into_branch()
    if kind == "controlnet":
        own, copy = model.spatial_blocks[0].state_dict(), model.injection.branch.pairs[0][0].state_dict()
        assert all(torch.equal(own[name], copy[name]) for name in own)
    return model


def small(**changes: object) -> STDiT3:
    torch.manual_seed(0)
    config = DitConfig(
        depth=2, hidden_size=32, num_heads=2, in_channels=4, caption_channels=8, model_max_length=6, pred_sigma=False,
        **changes,
    )  # fmt: skip
    model = STDiT3(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_frozen_frames_do_not_depend_on_the_time() -> None:
    """A conditioning frame is modulated as at time 0: with all frames frozen the time does not matter to the layers.

    (The final layer norms them at the time first, as the public model does; nothing reads what it predicts for them.)
    """
    model = small()
    x, text = torch.randn(1, 4, 5, 4, 4), torch.randn(1, 6, 8)
    condition = model.condition((5, 4, 4), text, None, torch.tensor([16.0]), (32, 32))
    frozen = torch.zeros(1, 5, dtype=torch.bool)
    some = torch.tensor([[False, False, True, True, True]])
    seen: list[torch.Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for noisy in (frozen, some, None):
        for time in (100.0, 900.0):
            model(x, torch.tensor([time]), condition, noisy)
    (first, last), (with_noise, later), (free, other) = seen[:2], seen[2:4], seen[4:]
    assert torch.equal(first, last) and not torch.allclose(free, other, atol=1e-3)
    # those beside frames with noise hear of it in the temporal blocks
    assert not torch.allclose(with_noise[:, :2], later[:, :2], atol=1e-3)


def test_joint_attention_sees_other_places_and_temporal_does_not_within_one_block() -> None:
    for kind, seen in (("temporal", False), ("joint", True)):
        block = small(temporal_attention=kind).temporal_blocks[0]
        x = torch.randn(1, 3, 4, 32, generator=torch.Generator().manual_seed(1))
        changed = x.clone()
        changed[0, 0, 0, :4] += 3.0
        rotary = small().rope.angles(torch.arange(3).repeat_interleave(4 if kind == "joint" else 1))
        text = block.cross_attn.keys_values(torch.randn(1, 6, 32))
        time = torch.zeros(1, 1, 6, 32)
        with torch.no_grad():
            moved = (block(x, time, text, None, rotary) - block(changed, time, text, None, rotary)).abs()
        assert bool((moved[0, 2, 3] > 1e-6).any()) is seen


def test_tokens_without_injection_are_refused() -> None:
    model = small(injection=InjectionConfig(enabled=False))
    with pytest.raises(ValueError, match="without semantic injection"):
        model.condition(
            (5, 4, 4), torch.randn(1, 6, 8), None, torch.tensor([16.0]), (32, 32), torch.randn(1, 4, 5, 4, 4)
        )


def test_dropped_tokens_give_the_base() -> None:
    model = small()
    text, fps, coarse = torch.randn(2, 6, 8), torch.full((2,), 16.0), torch.randn(2, 4, 5, 4, 4)
    x, time = torch.randn(2, 4, 5, 4, 4), torch.full((2,), 500.0)
    keep = torch.tensor([True, False])
    guided_out = model(x, time, model.condition((5, 4, 4), text, None, fps, (32, 32), coarse, keep))
    plain = model(x, time, model.condition((5, 4, 4), text, None, fps, (32, 32)))
    assert torch.allclose(guided_out[1], plain[1], atol=1e-6)
    assert not torch.allclose(guided_out[0], plain[0], atol=1e-3)
