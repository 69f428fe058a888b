"""Semantic injection and uncertainty sampling."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.config import DitConfig, InjectionConfig
from arlon_ray.models.injection import UncertaintySampling, listening_layers


def test_uncertainty_sampling_perturbs_statistics_of_some_samples_in_training_only() -> None:
    features = torch.randn(64, 10, 6) * torch.linspace(0.5, 2.0, 64)[:, None, None]
    module = UncertaintySampling(0.5).train()
    drawn = module(features, torch.Generator().manual_seed(0))
    changed = (drawn - features).abs().amax((1, 2)) > 1e-6
    assert 16 < int(changed.sum()) < 48
    # what is left after normalising is the same: only mean and deviation of a channel move
    normal = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (features[changed], drawn[changed])]
    assert torch.allclose(normal[0].abs(), normal[1].abs(), atol=1e-3)
    assert torch.equal(module.eval()(features, None), features)


def test_drawn_means_spread_as_the_batch_does() -> None:
    features = torch.randn(512, 32, 1) * 0.01 + torch.randn(512, 1, 1) * 3.0
    drawn = UncertaintySampling(1.0).train()(features, torch.Generator().manual_seed(0))
    moved = drawn.mean(1) - features.mean(1)
    assert float(moved.std()) == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize(
    "layers, expected",
    [("first_half", range(14)), ("all", range(28)), ("last_half", range(14, 28)), ("first_quarter", range(7))],
)
def test_layers_that_listen(layers: str, expected: range) -> None:
    assert listening_layers(DitConfig(injection=InjectionConfig(layers=layers))) == expected  # type: ignore[arg-type]
