"""Triton's kernels give what plain operations give: on a GPU, or in Triton's interpreter where only Triton is there."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from arlon_ray.generation import kernels  # noqa: E402

pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 18])
@pytest.mark.parametrize("sizes", [(64, 96), (40, 30), (1100, 20)])
def test_products(rows: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, outputs = sizes

    def near_one(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype)

    x, added, norm = near_one(rows, inputs), near_one(rows, outputs), torch.rand(inputs, device=DEVICE) + 0.5
    weight, both = near_one(outputs, inputs) * inputs**-0.5, near_one(2 * outputs, inputs) * inputs**-0.5
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-3) * norm
    gate, up = (normed @ both.float().T).chunk(2, -1)
    plain = wide @ weight.float().T
    for found, expected in (
        (kernels.product(x, weight), plain),
        (kernels.product(x, weight, added), plain + added.float()),
        (kernels.product(x, weight, added, norm, 1e-3), normed @ weight.float().T + added.float()),
        (kernels.product(x, both, None, norm, 1e-3, gated=True), F.silu(gate) * up),
    ):
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        assert found.dtype == dtype and torch.allclose(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads, channels", [(2, 16), (3, 24)])
@pytest.mark.parametrize("parts", [1, 4])
def test_attention_stores_what_is_new_and_sees_what_is_filled(heads: int, channels: int, parts: int) -> None:
    rows, positions = 3, 200
    qkv, norm = torch.randn(rows, 3 * heads * channels, device=DEVICE), torch.rand(2, channels, device=DEVICE) + 0.5
    angles = torch.randn(rows * positions, 2, channels // 2, device=DEVICE)
    turns, filled = torch.polar(torch.ones_like(angles), angles), torch.tensor([130, 0, 63], device=DEVICE)
    row = torch.arange(rows, device=DEVICE)
    at = row * positions + filled
    keys, values = (torch.randn(rows, heads, positions, channels, device=DEVICE) for _ in range(2))
    visible = torch.rand(rows, positions, device=DEVICE) > 0.3
    visible[row, filled] = True
    parted = qkv.view(rows, 3, heads, channels)
    qk = parted[:, :2] * torch.rsqrt(parted[:, :2].square().sum(-1, keepdim=True) + 1e-3) * norm[:, None]
    pairs = torch.view_as_complex(qk.unflatten(-1, (-1, 2)).contiguous()) * turns[at][:, :, None]
    q, k = torch.view_as_real(pairs).flatten(-2).unbind(1)
    all_keys, all_values = keys.clone(), values.clone()
    all_keys[row, :, filled], all_values[row, :, filled] = k, parted[:, 2]
    mask = (visible & (torch.arange(positions, device=DEVICE) <= filled[:, None]))[:, None, None]
    expected = F.scaled_dot_product_attention(q[:, :, None], all_keys, all_values, attn_mask=mask).flatten(1)
    found = kernels.attend(qkv, norm, 1e-3, turns, at, filled, keys, values, visible, heads, parts)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(keys, all_keys, atol=1e-5) and torch.equal(values, all_values)
