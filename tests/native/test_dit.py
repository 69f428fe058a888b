"""What the DiT does between its products, in C++, is what torch's operations give, whatever is beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from arlon_ray import native
from arlon_ray.config import DitConfig
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.layers import RMSNorm, RotaryEmbedding, attend, rotate
from arlon_ray.native import dit

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def plainly() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("channels", [8, 24, 128, 1152])
@pytest.mark.parametrize("every", [1, 4])
def test_modulated_norms_are_those_of_torch(built: ctypes.CDLL, channels: int, every: int) -> None:
    x, rows = torch.randn(3, 12, channels) * 5 + 2, 36 // every
    shift, scale, gate = torch.randn(rows, 3 * channels).chunk(3, 1)  # rows are further apart than they are long
    each = [part.repeat_interleave(every, 0).view_as(x) for part in (shift, scale, gate)]
    expected = F.layer_norm(x, (channels,), eps=1e-6) * (1 + each[1]) + each[0]
    found = dit.modulated(built, x, shift, scale)
    assert torch.allclose(found, expected, **CLOSE)
    assert torch.allclose(dit.modulated(built, x, shift, scale, gate), x + each[2] * expected, **CLOSE)
    part = slice(4 // every, 8 // every)
    assert torch.equal(dit.modulated(built, x.flatten(0, 1)[4:8], shift[part], scale[part]), found.flatten(0, 1)[4:8])


@pytest.mark.parametrize("count", [1, 7, 16, 40, 1003])
def test_gelu_is_that_of_torch(built: ctypes.CDLL, count: int) -> None:
    x = torch.linspace(-30, 30, count)
    expected = F.gelu(x, approximate="tanh")
    assert torch.allclose(dit.gelu_in_place(built, x.clone()), expected, **CLOSE)
    far = torch.tensor([-1e4, 1e4, torch.nan, torch.inf])
    assert torch.allclose(dit.gelu_in_place(built, far), torch.tensor([0, 1e4, torch.nan, torch.inf]), equal_nan=True)


def plain_attention(
    qkv: Tensor, heads: int, norms: list[RMSNorm] | None, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """[.., N, 3·C] to [.., N, C] by torch."""
    q, k, v = (part.transpose(-3, -2) for part in qkv.unflatten(-1, (3, heads, -1)).unbind(-3))
    if norms:
        q, k = norms[0](q), norms[1](k)
    if rotary:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    return attend(q, k, v).transpose(-3, -2).flatten(-2)


@pytest.mark.parametrize("heads, channels", [(1, 8), (3, 24), (4, 32), (2, 72)])
@pytest.mark.parametrize("frames, places", [(1, 1), (5, 7), (10, 16), (3, 33)])
def test_self_attention_is_that_of_torch(
    built: ctypes.CDLL, heads: int, channels: int, frames: int, places: int
) -> None:
    qkv, norms = torch.randn(2, frames, places, 3 * heads * channels), [RMSNorm(channels), RMSNorm(channels)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
    weights = (norms[0].weight, norms[1].weight)
    rotary = RotaryEmbedding(channels).angles(torch.arange(max(frames, frames * places)))
    over_frames = (rotary[0][:frames].contiguous(), rotary[1][:frames].contiguous())
    eps = norms[0].eps

    spatial = dit.self_attention(built, qkv, heads, weights, eps, None)
    assert torch.allclose(spatial, plain_attention(qkv, heads, norms, None), **CLOSE)
    over_time = dit.self_attention(built, qkv, heads, weights, eps, over_frames, over_time=True)
    expected = plain_attention(rearrange(qkv, "b t s c -> b s t c"), heads, norms, over_frames)
    assert torch.allclose(over_time, rearrange(expected, "b s t c -> b t s c"), **CLOSE)
    joint = dit.self_attention(built, qkv.flatten(1, 2)[:, None], heads, None, 0.0, rotary)
    assert torch.allclose(joint[:, 0], plain_attention(qkv.flatten(1, 2), heads, None, rotary), **CLOSE)

    # to the last bit, whatever is beside it
    assert torch.equal(dit.self_attention(built, qkv[1:], heads, weights, eps, None), spatial[1:])
    alone = dit.self_attention(built, qkv[:1, :, -1:], heads, weights, eps, over_frames, over_time=True)
    assert torch.equal(alone, over_time[:1, :, -1:])


@pytest.mark.parametrize("tokens", [1, 10, 33])
def test_cross_attention_is_that_of_torch(built: ctypes.CDLL, tokens: int) -> None:
    q, keys, values, lengths = torch.randn(3, tokens, 48), *torch.randn(2, 3, 2, 21, 24), (21, 1, 17)
    found = dit.cross_attention(built, q, keys, values, lengths)
    for sample, length in enumerate(lengths):
        heads = q[sample].unflatten(-1, (2, 24)).transpose(0, 1)
        expected = attend(heads, keys[sample, :, :length], values[sample, :, :length])
        assert torch.allclose(found[sample], expected.transpose(0, 1).flatten(1), **CLOSE)
        one = slice(sample, sample + 1)
        alone = dit.cross_attention(built, q[one], keys[one, :, :length], values[one, :, :length], (length,))
        assert torch.equal(alone[0], found[sample])


def test_what_is_not_a_number_stays_none(built: ctypes.CDLL) -> None:
    qkv = torch.randn(1, 2, 16, 3 * 32)
    qkv[0, 1, 3] = torch.nan
    found = dit.self_attention(built, qkv, 2, None, 0.0, None)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().all()


def test_threads_do_not_change_a_bit(built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, x, table = torch.randn(2, 6, 16, 3 * 64), torch.randn(2, 6, 16, 64), torch.randn(3, 12, 64)

    def made(threads: int) -> list[Tensor]:
        monkeypatch.setattr(native, "threads", lambda *_: threads)
        return [
            dit.self_attention(built, qkv, 2, None, 0.0, None),
            dit.modulated(built, x, *table),
            dit.gelu_in_place(built, x.clone()),
        ]

    assert all(torch.equal(one, many) for one, many in zip(made(1), made(3), strict=True))


@pytest.mark.parametrize("temporal", ["temporal", "joint"])
@pytest.mark.parametrize("guided", [True, False])
def test_a_model_is_what_it_is_without_a_compiler(
    built: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, temporal: str, guided: bool
) -> None:
    config = DitConfig(
        depth=4, hidden_size=48, num_heads=2, in_channels=4, caption_channels=16, model_max_length=7,
        temporal_attention=temporal, input_sq_size=64,
    )  # fmt: skip
    model = STDiT3(config).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, text, noisy = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 7, 16), torch.ones(2, 5, dtype=torch.bool)
    noisy[:, :2] = False
    calls: list[str] = []
    for name in ("modulated", "self_attention", "cross_attention", "gelu_in_place"):
        monkeypatch.setattr(built, name, counted(calls, name, getattr(built, name)))

    def velocity(real: Tensor | tuple[int, ...] | None) -> Tensor:
        condition = model.condition((5, 8, 8), text, real, torch.tensor([16.0, 24.0]), (64, 64), x if guided else None)
        return model(x, torch.tensor([300.0, 900.0]), condition, noisy)

    reals = ((7, 4), None, torch.arange(7)[None] < torch.tensor([7, 4])[:, None])
    found = [velocity(real) for real in reals]
    assert set(calls) == {"modulated", "self_attention", "cross_attention", "gelu_in_place"}
    calls.clear()
    with FlopCounterMode(display=False) as counter:  # whoever counts torch's operations sees all of them
        velocity(reals[0])
    assert not calls and counter.get_total_flops() > 0
    with torch.enable_grad():
        velocity(reals[0]).sum().backward()
    assert not calls and model.x_embedder.proj.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):  # what x meets may be in half precision
        rounded = [velocity(real) for real in reals]
    assert not calls
    for ours, theirs in zip(found, rounded, strict=True):
        assert torch.allclose(ours, theirs.float(), rtol=0.1, atol=0.1)
    monkeypatch.setattr(native, "library", lambda: None)
    for real, ours in zip(reals, found, strict=True):
        assert torch.allclose(velocity(real), ours, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[0], found[2], rtol=1e-4, atol=1e-5) and not calls


def counted(calls: list[str], name: str, function: object) -> object:
    def call(*arguments: object) -> None:
        calls.append(name)
        function(*arguments)  # type: ignore[operator]

    return call
