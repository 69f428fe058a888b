"""What layers do faster is what the formulas say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from arlon_ray.models.layers import CrossAttention, Mlp, RMSNorm, attend, rotate


def test_an_mlp_without_gradients_is_the_same() -> None:
    mlp, x = Mlp(8, 16, 8), torch.cat([torch.linspace(-12, 12, 4000), torch.tensor([-1e4] * 8)]).view(-1, 8)
    hidden = mlp.fc1(x)
    expected = mlp.fc2(F.gelu(hidden, approximate="tanh"))
    with torch.no_grad():
        assert torch.allclose(mlp(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mlp(x), mlp.fc2(F.gelu(hidden)), rtol=1e-5, atol=1e-5), "the exact one is another"
    assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_rotation_turns_pairs(dtype: torch.dtype, tolerance: float) -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    twice = angles.repeat_interleave(2, -1)
    turned = rotate(x.to(dtype), twice.cos(), twice.sin()).float()
    for pair in range(4):
        even, odd, angle = x[..., 2 * pair], x[..., 2 * pair + 1], angles[:, pair]
        expected = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1)
        assert (turned[..., 2 * pair : 2 * pair + 2] - expected).abs().max() < tolerance * 4


def test_norm_is_the_formulas() -> None:
    norm, x = RMSNorm(16), torch.randn(3, 16) * 10
    norm.weight.data.normal_()
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x), expected, atol=1e-5)
    assert norm(x.bfloat16()).dtype is torch.bfloat16


def test_attention_is_softmax_of_scores() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    mask = torch.rand(2, 1, 1, 7) < 0.7
    mask[..., 0] = True
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, -math.inf)
    assert torch.allclose(attend(q, k, v, mask), scores.softmax(-1) @ v, atol=1e-5)


def test_lengths_of_texts_do_what_a_mask_does() -> None:
    torch.manual_seed(0)
    layer, x, text = CrossAttention(16, 2), torch.randn(4, 5, 16), torch.randn(4, 6, 16)
    lengths = (6, 2, 2, 4)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    masked = layer(x, layer.keys_values(text), mask)
    short = layer(x, layer.keys_values(text), lengths)
    assert torch.allclose(short, masked, atol=1e-6)
    assert not torch.allclose(layer(x, layer.keys_values(text), None), masked, atol=1e-3)
    # each as it is alone, to the last bit
    alone = layer(x[3:], tuple(part[3:, :, :4] for part in layer.keys_values(text)), (4,))
    assert torch.equal(alone, short[3:])
