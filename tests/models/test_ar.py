"""The AR: causal, equal with and without its cache, and deaf to padding."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.config import ArConfig, SamplingConfig
from arlon_ray.generation.options import GenerationOptions, default_options
from arlon_ray.generation.planning import draw, sample_tokens
from arlon_ray.models.ar import ArTransformer

GRID = (4, 2, 3)
COUNT = 24


@pytest.fixture(scope="module")
def model() -> ArTransformer:
    torch.manual_seed(0)
    ar = ArTransformer(ArConfig(dim=32, layers=2, heads=2), codebook_size=16, text_dim=8, max_text=6).eval()
    with torch.no_grad():
        for parameter in ar.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return ar


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[True] * 4 + [False] * 2])
    return torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(1)), mask


def greedy() -> GenerationOptions:
    return default_options(SamplingConfig(ar_guidance_scale=1.0, top_k=1))


def test_a_token_depends_on_earlier_ones_only(model: ArTransformer, text) -> None:
    tokens = torch.randint(16, (1, COUNT), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 16
    before, after = model(*text, tokens, GRID), model(*text, changed, GRID)
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] - after[:, 11:]).abs().amax(-1).gt(1e-4).all()


def test_padding_is_not_seen_and_text_is(model: ArTransformer, text) -> None:
    values, mask = text
    tokens = torch.zeros(1, COUNT, dtype=torch.long)
    padded, worded = values.clone(), values.clone()
    padded[0, 5] += 5.0
    worded[0, 1] += 5.0
    plain = model(values, mask, tokens, GRID)
    assert torch.allclose(model(padded, mask, tokens, GRID), plain, atol=1e-6)
    assert not torch.allclose(model(worded, mask, tokens, GRID), plain, atol=1e-3)


def test_cached_sampling_equals_the_full_forward(model: ArTransformer, text) -> None:
    """Greedy tokens through the cache are the argmax of the uncached logits over the same prefix."""
    context = torch.tensor([3, 1, 4, 1, 5])
    tokens = sample_tokens(model, *text, context, GRID, greedy(), torch.Generator().manual_seed(0))
    assert torch.equal(tokens[:5], context)
    best = model(*text, tokens[None], GRID)[0].argmax(-1)
    assert torch.equal(best[5:], tokens[5:])


def test_guidance_combines_the_two_branches(model: ArTransformer, text) -> None:
    options = greedy().model_copy(update={"ar_guidance_scale": 3.0})
    empty = torch.zeros(0, dtype=torch.long)
    tokens = sample_tokens(model, *text, empty, GRID, options, torch.Generator().manual_seed(0))
    null = model.without_text(*text, torch.tensor([True]))
    conditional, unconditional = model(*text, tokens[None], GRID), model(*null, tokens[None], GRID)
    guided = unconditional + 3.0 * (conditional - unconditional)
    assert torch.equal(guided[0].argmax(-1), tokens)


def test_sampling_is_deterministic_and_can_be_stopped(model: ArTransformer, text) -> None:
    options = default_options(SamplingConfig(top_p=0.9))
    empty = torch.zeros(0, dtype=torch.long)
    first, second = (
        sample_tokens(model, *text, empty, GRID, options, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)

    def stop(count: int) -> None:
        if count == 9:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_tokens(model, *text, empty, GRID, options, torch.Generator(), stop)


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)

    def seen(**changes: object) -> set[int]:
        options = default_options(SamplingConfig(top_p=1.0), **changes)
        return {int(draw(logits, options, generator)) for _ in range(300)}

    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {0, 1}
    # softmax: .64 .24 .09 .03 .01; the first two reach .85
    assert seen(top_p=0.85) == {0, 1}
    assert seen(temperature=0.05) == {0}
