"""The AR: causal, equal with and without its cache, and deaf to padding; token by token and in blocks.

Blocks of 2 × 2 reach beyond the right edge of the 4 × 2 × 3 grid.
"""

from __future__ import annotations

import pytest
import torch

from arlon_ray.config import ArConfig, SamplingConfig
from arlon_ray.generation.decoder import Choice, draw
from arlon_ray.generation.options import GenerationOptions, default_options
from arlon_ray.generation.sampling import sample_tokens
from arlon_ray.models.ar import ArTransformer, frame_times

GRID = (4, 2, 3)
#: Places of the grid in the order in which they are drawn.
ORDER = {
    (1, 1): [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
    (2, 2): [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (1, 2)],
    (1, 3): [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
}


@pytest.fixture(scope="module", params=list(ORDER), ids=lambda block: f"{block[0]}x{block[1]}")
def model(request: pytest.FixtureRequest) -> ArTransformer:
    torch.manual_seed(0)
    config = ArConfig(dim=32, layers=2, heads=2, block=request.param)
    ar = ArTransformer(config, codebook_size=16, text_dim=8, max_text=6).eval()
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


def drawn_order(model: ArTransformer, values_thwX: torch.Tensor) -> torch.Tensor:
    """[24, …] in the order in which the tokens are drawn."""
    order = ORDER[model.config.block]
    return torch.stack([values_thwX[t, row, column] for t in range(GRID[0]) for row, column in order])


def random_tokens(seed: int) -> torch.Tensor:
    return torch.randint(16, (1, *GRID), generator=torch.Generator().manual_seed(seed))


def test_a_token_depends_on_earlier_ones_only(model: ArTransformer, text) -> None:
    tokens = random_tokens(2)
    before = drawn_order(model, model(*text, tokens)[0])
    for at in (7, 10, 16):
        frame, (row, column) = at // 6, ORDER[model.config.block][at % 6]
        changed = tokens.clone()
        changed[0, frame, row, column] = (changed[0, frame, row, column] + 1) % 16
        after = drawn_order(model, model(*text, changed)[0])
        assert torch.equal(before[: at + 1], after[: at + 1])
        assert (before[at + 1 :] - after[at + 1 :]).abs().amax(-1).gt(1e-5).all()


def test_padding_is_not_seen_and_text_is(model: ArTransformer, text) -> None:
    values, mask = text
    tokens = torch.zeros(1, *GRID, dtype=torch.long)
    padded, worded = values.clone(), values.clone()
    padded[0, 5] += 5.0
    worded[0, 1] += 5.0
    plain = model(values, mask, tokens)
    assert torch.allclose(model(padded, mask, tokens), plain, atol=1e-6)
    assert not torch.allclose(model(worded, mask, tokens), plain, atol=1e-3)


def test_cached_sampling_equals_the_full_forward(model: ArTransformer, text) -> None:
    """Greedy tokens through the cache are the argmax of the uncached logits over the same prefix."""
    context = random_tokens(3)[0, :1]
    tokens = sample_tokens(model, *text, context, GRID, greedy(), torch.Generator().manual_seed(0))
    assert tokens.shape == GRID and torch.equal(tokens[:1], context)
    best = model(*text, tokens[None])[0].argmax(-1)
    assert torch.equal(best[1:], tokens[1:])


def test_guidance_combines_the_two_branches(model: ArTransformer, text) -> None:
    options = greedy().model_copy(update={"ar_guidance_scale": 3.0})
    tokens = sample_tokens(model, *text, random_tokens(0)[0, :0], GRID, options, torch.Generator().manual_seed(0))
    null = model.without_text(*text, torch.tensor([True]))
    conditional, unconditional = model(*text, tokens[None]), model(*null, tokens[None])
    guided = unconditional + 3.0 * (conditional - unconditional)
    assert torch.equal(guided[0].argmax(-1), tokens)


def test_sampling_is_deterministic_and_can_be_stopped(model: ArTransformer, text) -> None:
    options, seen = default_options(SamplingConfig(top_p=0.9)), []
    empty = random_tokens(0)[0, :0]
    first, second = (
        sample_tokens(model, *text, empty, GRID, options, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second) and int(first.max()) < 16

    def stop(count: int) -> None:
        seen.append(count)
        if count == 9:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample_tokens(model, *text, empty, GRID, options, torch.Generator(), stop)
    assert seen == list(range(10))


def test_top_k_and_top_p_leave_out_the_rest() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)

    def seen(**changes: object) -> set[int]:
        options = default_options(SamplingConfig(top_p=1.0), **changes)
        choice = Choice.of([options] * 300, torch.device("cpu"))
        return set(draw(logits.expand(300, -1), choice, torch.rand(300, generator=generator)).tolist())

    assert seen() == {0, 1, 2, 3, 4}
    assert seen(top_k=2) == {0, 1}
    # softmax: .64 .24 .09 .03 .01; the first two reach .85
    assert seen(top_p=0.85) == {0, 1}
    assert seen(temperature=0.05) == {0}


def test_frames_that_follow_a_gap_are_elsewhere(model: ArTransformer, text) -> None:
    """Cached sampling and the full forward agree about when frames are, and the gap is noticed behind it alone."""
    times, tokens = frame_times(4, sink=1, gap=3), random_tokens(4)
    assert times.tolist() == [0, 4, 5, 6] and frame_times(3, sink=1, gap=0).tolist() == [0, 1, 2]
    plain, apart = (model(*text, tokens, when)[0] for when in (None, times))
    assert torch.equal(plain[0], apart[0]) and not torch.allclose(plain[1], apart[1], atol=1e-3)
    assert torch.equal(plain, model(*text, tokens, torch.arange(4))[0])
    context = tokens[0, :2]
    drawn = sample_tokens(model, *text, context, GRID, greedy(), torch.Generator().manual_seed(0), times_t=times)
    assert torch.equal(drawn[2:], model(*text, drawn[None], times)[0].argmax(-1)[2:])
