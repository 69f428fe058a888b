"""The steps of the AR as a GPU makes them draw the same tokens as those of a CPU; products do not depend on others."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from arlon_ray import native
from arlon_ray.config import ArConfig, SamplingConfig
from arlon_ray.generation.decoder import BUCKET
from arlon_ray.generation.options import default_options
from arlon_ray.generation.products import Norm, Products
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.layers import RMSNorm

GRID = (6, 6, 8)


def build(block: tuple[int, int], device: str = "cpu", dtype: torch.dtype = torch.float32) -> ArTransformer:
    torch.manual_seed(0)
    model = ArTransformer(ArConfig(dim=64, layers=2, heads=2, block=block), codebook_size=64, text_dim=8, max_text=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype).requires_grad_(False).eval()


def samplings(device: str = "cpu") -> list[Sampling]:
    """With guidance and without, with padded text and whole, of different lengths."""
    made = []
    for number in range(5):
        options = default_options(
            SamplingConfig(ar_guidance_scale=[1.0, 2.5][number % 2], top_p=[0.95, 1.0, 0.6][number % 3]),
            top_k=[0, 9][number // 2 % 2],
        )
        text = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(number)).to(device)
        mask = (torch.arange(6, device=device) < 6 - number % 4)[None]
        context = torch.full((number % 3, *GRID[1:]), number, device=device)
        generator = torch.Generator(device).manual_seed(number)
        made.append(Sampling((text, mask), context, (GRID[0] - number % 2, *GRID[1:]), options, generator))
    return made


def drawn(model: ArTransformer, most: int, by_index: bool | None, device: str = "cpu") -> list[torch.Tensor]:
    """Each one's tokens, joining two steps after the one before, as soon as there is room."""
    batch = SamplingBatch(model, 6 + GRID[0] * GRID[1] * GRID[2], most, by_index)
    members = samplings(device)
    waiting = list(members)
    while waiting or batch.members:
        if waiting and batch.has_room():
            batch.join(waiting.pop(0))
        batch.step()
        batch.step()
    return [member.result for member in members]


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_steps_by_index_draw_what_steps_by_runs_draw(block: tuple[int, int]) -> None:
    """The second is what a GPU captures: places on the device, and buckets of positions."""
    model = build(block)
    assert 6 + GRID[0] * GRID[1] * GRID[2] > BUCKET  # more than one bucket
    by_runs = drawn(model, 1, False)
    for most in (1, 3):
        for one, other in zip(by_runs, drawn(model, most, True), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("other", [1, 3])
def test_padding_behind_the_text_is_not_computed(guidance: float, other: int) -> None:
    """Tokens are those of the text without it, and it takes no room in the cache; `other`: words of a negative text."""
    model, options = build((1, 1)), default_options(SamplingConfig(ar_guidance_scale=guidance))
    text, against = torch.randn(2, 1, 6, 8)
    found = []
    for length in (3, 6):
        mask, less = ((torch.arange(length) < words)[None] for words in (3, other))
        negative = None if other == 1 else (against[:, :length], less)
        context, generator = torch.zeros(1, *GRID[1:], dtype=torch.long), torch.Generator().manual_seed(0)
        member = Sampling((text[:, :length], mask), context, GRID, options, generator, None, negative)
        batch = SamplingBatch(model, 3 + GRID[0] * GRID[1] * GRID[2])
        batch.join(member)
        found.append((member.filled, batch.decoder.state[: member.rows].clone()))
        while not member.ended:
            batch.step()
        found[-1] += (member.result,)  # type: ignore[assignment]
    (filled, state, tokens), (with_padding, its_state, its_tokens) = found  # type: ignore[misc]
    assert filled == with_padding == 3 + 1 + GRID[1] * GRID[2]
    assert torch.equal(state, its_state) and torch.equal(tokens, its_tokens)


def test_without_weights_laid_out_rows_come_in_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build((2, 3))
    expected = drawn(model, 1, False)
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert Products(model.head.weight).whole(5) == 8
    for most in (1, 3):
        for one, other in zip(expected, drawn(model, most, None), strict=True):
            assert torch.equal(one, other)


def test_in_bfloat16_it_is_as_deterministic() -> None:
    model = build((1, 1), dtype=torch.bfloat16)
    alone, beside = drawn(model, 1, None), drawn(model, 3, None)
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("in_panels", [True, False])
def test_a_product_is_the_same_whatever_is_beside_it(
    threads: int, in_panels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In C++, and where that cannot be built."""
    if not in_panels:
        monkeypatch.setattr(native, "library", lambda: None)
    before, sizes = torch.get_num_threads(), random.Random(0)
    torch.set_num_threads(threads)
    try:
        for _ in range(40):
            inside, outside = sizes.choice([8, 24, 30, 64, 100, 192, 512, 1280]), sizes.choice([5, 33, 64, 576, 1920])
            layer = nn.Linear(inside, outside, bias=False).requires_grad_(False)
            product = Products(layer.weight).of(layer)
            x, added = torch.randn(40, inside), torch.randn(40, outside)
            whole, summed = product(x), product(x, added)
            assert torch.allclose(whole, layer(x), atol=1e-4) and torch.allclose(summed, whole + added, atol=1e-4)
            for rows in (1, 2, 3, 5, 8, 11, 16, 17, 31):
                part = slice(first := sizes.randint(0, 40 - rows), first + rows)
                assert torch.equal(product(x[part]), whole[part])
                assert torch.equal(product(x[part], added[part]), summed[part])
    finally:
        torch.set_num_threads(before)


def test_weights_are_laid_out_once_while_they_are_frozen() -> None:
    layer, x = nn.Linear(24, 16, bias=False), torch.randn(3, 24)
    products = Products(layer.weight)
    for frozen in (True, False, True):
        layer.requires_grad_(not frozen)
        with torch.no_grad():
            assert torch.allclose(products.of(layer)(x), layer(x), atol=1e-5)
            layer.weight.add_(1.0)
            assert torch.allclose(products.of(layer)(x), layer(x), atol=1e-5)
    layer.requires_grad_(True)
    layer.weight.data.mul_(2.0)
    with torch.no_grad():
        assert torch.allclose(products.of(layer)(x), layer(x), atol=1e-5)


def test_the_norm_is_that_of_the_model() -> None:
    norm = RMSNorm(48)
    nn.init.normal_(norm.weight)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = (3 * torch.randn(7, 48)).to(dtype)
        assert torch.allclose(Norm.of(norm)(x).float(), norm(x).float(), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_captured_steps_draw_what_plain_steps_draw(block: tuple[int, int]) -> None:
    """In float32, where tokens that are all but equally likely are rare."""
    model = build(block, "cuda")
    plain = drawn(model, 1, False, "cuda")
    for most in (1, 3):
        for one, other in zip(plain, drawn(model, most, None, "cuda"), strict=True):
            assert (one == other).float().mean() > 0.95
