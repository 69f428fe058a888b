"""Triton's attention over time gives what plain operations give, forward and backward, compiled too: on a GPU, or in
Triton's interpreter where only Triton is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from arlon_ray.models import over_time  # noqa: E402
from arlon_ray.models.layers import RotaryEmbedding, SelfAttention  # noqa: E402

pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.fixture(autouse=True)
def tried_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In what the interpreter computes: of bfloat16 it makes nonsense."""
    if DEVICE == "cpu":
        monkeypatch.setattr(over_time, "TOLERANCES", {torch.float32: 1e-3, torch.float16: 1e-2})
    over_time._tried.cache_clear()
    yield
    over_time._tried.cache_clear()


def layer_and_input(
    sizes: tuple[int, int, int, int, int], qk_norm: bool
) -> tuple[SelfAttention, Tensor, tuple[Tensor, Tensor]]:
    """An attention layer with weights of its own, x [B, T, S, C] and rotations of its frames."""
    batch, frames, places, heads, channels = sizes
    torch.manual_seed(0)
    layer = SelfAttention(heads * channels, heads, qk_norm).to(DEVICE)
    for norm in (layer.q_norm, layer.k_norm) if qk_norm else ():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    x = torch.randn(batch, frames, places, heads * channels, device=DEVICE, requires_grad=True)
    rotary = RotaryEmbedding(channels).to(DEVICE).angles(torch.arange(frames, device=DEVICE))
    return layer, x, rotary


def values_and_gradients(layer: SelfAttention, x: Tensor, rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What comes out, and what is asked of x and of the weights."""
    out = layer(x, "time", rotary)
    asked = torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum(),
                                [x, *layer.parameters()])  # fmt: skip
    return [out.detach(), *asked]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("sizes", [(2, 5, 3, 2, 16), (1, 15, 4, 2, 24), (2, 20, 2, 1, 72)])
def test_as_plain_operations(
    sizes: tuple[int, int, int, int, int], qk_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, rotary = layer_and_input(sizes, qk_norm)
    monkeypatch.setattr(over_time, "fits", lambda *_: False)
    expected = values_and_gradients(layer, x, rotary)
    called = []
    monkeypatch.setattr(over_time, "fits", lambda *_: called.append(1) or True)
    found = values_and_gradients(layer, x, rotary)
    assert called
    for mine, plain in zip(found, expected, strict=True):
        assert torch.allclose(mine, plain, atol=2e-5, rtol=2e-4), float((mine - plain).abs().max())


def test_in_half_precision() -> None:
    layer, x, rotary = layer_and_input((2, 15, 3, 2, 24), True)
    expected = layer(x, "time", rotary)
    q, k = (norm.weight for norm in (layer.q_norm, layer.k_norm))
    halves = layer.qkv(x).half()
    attended = over_time.attention_over_time(halves, (q, k), 1e-6, rotary)  # type: ignore[arg-type]
    assert attended.dtype is torch.float16 and torch.allclose(layer.proj(attended.float()), expected, atol=5e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="compiled for a GPU")
def test_compiled_it_is_the_same() -> None:
    layer, x, rotary = layer_and_input((2, 15, 6, 2, 24), True)
    expected = values_and_gradients(layer, x, rotary)
    layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]
    for mine, plain in zip(values_and_gradients(layer, x, rotary), expected, strict=True):
        assert torch.allclose(mine, plain, atol=2e-5, rtol=2e-4)


def test_registered_as_torch_asks() -> None:
    _, x, rotary = layer_and_input((1, 5, 2, 2, 16), True)
    qkv = torch.randn(*x.shape[:3], 3 * x.shape[3], device=DEVICE, requires_grad=True)
    weights = [torch.rand(16, device=DEVICE).add(0.5).requires_grad_() for _ in range(2)]
    found = torch.library.opcheck(over_time._forward, (qkv, *weights, *rotary, 1e-6), atol=1e-4, rtol=1e-4)
    assert found and set(found.values()) == {"SUCCESS"}


def test_where_the_kernels_are_wrong_or_do_not_run_others_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert over_time.works(DEVICE, 24) and not caplog.records
    over_time._tried.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(over_time.TOLERANCES, torch.float32, -1.0)
        assert not over_time.works(DEVICE, 24) and "wrong in torch.float32" in caplog.text
    over_time._tried.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr("arlon_ray.models.over_time_kernels.backward", lambda *_: 1 / 0)
        assert not over_time.works(DEVICE, 24) and "division by zero" in caplog.text
        assert len(caplog.records) == 2 and not over_time.works(DEVICE, 24) and len(caplog.records) == 2


def test_it_is_tried_while_something_is_compiled() -> None:
    compiled = torch.compile(lambda x: x * 2 if over_time.works(DEVICE, 32) else x * 3, backend="eager")
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert over_time._tried.cache_info().misses == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="a grid of a GPU")
def test_more_sequences_than_one_axis_of_a_grid_has() -> None:
    qkv = torch.randn(1, 2, 70_000, 3 * 16, device=DEVICE, requires_grad=True)
    weights, rotary = (torch.ones(16, device=DEVICE),) * 2, (torch.ones(2, 16, device=DEVICE),) * 2
    pairs = [work(qkv, weights, 1e-6, rotary) for work in (over_time.attention_over_time, over_time.plain)]
    assert torch.allclose(*pairs, atol=1e-5)
    assert torch.allclose(*(torch.autograd.grad(out.sum(), qkv)[0] for out in pairs), atol=1e-5)


def test_only_where_it_fits() -> None:
    x = torch.empty(1, 33, 2, 64, device=DEVICE)
    assert not over_time.fits(x, 32) and over_time.fits(x[:, :32], 32) == (DEVICE == "cuda")
    assert not over_time.fits(x[:, :5], 1)
