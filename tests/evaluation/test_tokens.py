"""Figures of tokens: exact on a codec and an AR that are known, and errors where they were put."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from arlon_ray.bundle import Bundle
from arlon_ray.evaluation.cost import weights, work
from arlon_ray.evaluation.tokens import (
    _guide_error,
    caption_nats,
    error_profile,
    guide_errors,
    token_figures,
    wrong_tokens,
)
from tests.bundles import make_random_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle(make_random_bundle(tmp_path_factory.mktemp("tokens") / "bundle"))


def test_an_ar_that_knows_nothing_has_the_perplexity_of_the_codebook(bundle: Bundle) -> None:
    latents = [torch.randn(1, 8, 10, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        bundle.ar.head.weight.zero_()
    figures = token_figures(bundle, latents, ["a", "b", "c"])
    assert figures["ar_perplexity"] == pytest.approx(32, rel=1e-4)
    assert 0 < figures["fine_codebook_used"] <= 1 <= figures["fine_codebook_perplexity"] <= 32
    assert figures["fine_latent_error"] > 0.3 < figures["coarse_latent_error"]
    rebuilt = bundle.codec.decode(bundle.codec.encode(latents[0]))
    again = token_figures(bundle, [rebuilt], ["a"])
    expected = (bundle.codec.decode(bundle.codec.encode(rebuilt)) - rebuilt).square().mean() / rebuilt.var()
    assert again["fine_latent_error"] == pytest.approx(float(expected), rel=1e-4)


def test_what_another_caption_costs(bundle: Bundle) -> None:
    latents = [torch.randn(1, 8, 10, 8, 8)]
    with torch.no_grad():
        bundle.ar.head.weight.normal_(std=0.1)
    assert caption_nats(bundle, latents, ["a circle"], ["a circle"]) == [0.0]
    (there,), (back,) = (caption_nats(bundle, latents, [a], [b]) for a, b in (("left", "right"), ("right", "left")))
    assert there == pytest.approx(-back) and there != 0


def test_wrong_tokens_are_other_codes_in_the_share_asked_for() -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (10, 40, 40)).astype(np.int32)
    changed = wrong_tokens(tokens, 0.3, 32, seed=1)
    assert (changed != tokens).mean() == pytest.approx(0.3, abs=0.01)
    assert changed.dtype == np.int32 and 0 <= changed.min() <= changed.max() < 32
    assert np.array_equal(wrong_tokens(tokens, 0.0, 32, 1), tokens)
    assert (wrong_tokens(tokens, 1.0, 32, 1) != tokens).all()


def test_errors_are_found_where_they_are(bundle: Bundle) -> None:
    true = torch.zeros(4, 2, 2, dtype=torch.long)
    predicted = true.clone()
    predicted[1:3, 0, 0] = 5
    profile = error_profile(bundle.codec, true, predicted, torch.full((4, 2, 2), math.log(2)))
    assert profile["wrong"] == [0.0, 0.25, 0.25, 0.0] and profile["beside"] == [1.0]
    apart = (bundle.codec.codebook[5] - bundle.codec.codebook[0]).norm() / torch.pdist(bundle.codec.codebook).mean()
    assert profile["distance"][1] == pytest.approx(float(apart), rel=1e-4) and math.isnan(profile["distance"][0])
    assert profile["loss"] == pytest.approx([math.log(2)] * 4)


def test_what_kind_of_error_a_guide_has(bundle: Bundle) -> None:
    latents = [torch.randn(1, 8, 10, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    found = guide_errors(bundle, latents, ["a", "b"])
    assert all(found[name]["error"] > 0 and 0 <= found[name]["statistics"] <= 1 for name in ("ar", "coarse", "wrong"))
    assert len(found["profile"]["wrong"]) == 10 and 0.5 < np.mean(found["profile"]["wrong"]) <= 1  # random weights
    reference = torch.randn(1, 8, 10, 8, 8)
    scaled = reference * torch.linspace(0.5, 2, 8).view(8, 1, 1, 1) + 3
    assert _guide_error(scaled, reference)[1] == pytest.approx(1.0, abs=1e-6)
    assert _guide_error(reference + torch.randn_like(reference), reference)[1] < 0.05


def test_cost_counts_multiplications_and_living_storage() -> None:
    layer = torch.nn.Linear(100, 50, bias=False)
    assert weights(layer) == {"parameters": 5000.0, "weight_bytes": 20000.0}

    def call() -> None:
        first = layer(torch.zeros(10, 100))  # 10·100·4 and 10·50·4 bytes
        del first
        torch.zeros(100)

    with torch.no_grad():
        cost = work(call, torch.device("cpu"))
    assert cost == {"flops": 2.0 * 10 * 100 * 50, "peak_bytes": 6000.0}
