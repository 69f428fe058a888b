import pytest
import torch
from torch import nn

from arlon_ray.config import TrainingConfig
from arlon_ray.training.engine import whole_parameters
from arlon_ray.training.optimizer import (
    WeightAverage,
    build_optimizers,
    learning_rate_scale,
    muon_update,
    muon_updates,
    orthogonalized,
    parameter_groups,
)
from tests.training.regression_stage import Regression


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.1),
        ("constant", 9, 1.0),
        ("constant", 109, 1.0),
        ("linear", 4, 0.5),
        ("linear", 10, 1.0),
        ("linear", 60, 0.5),
        ("linear", 110, 0.0),
        ("cosine", 10, 1.0),
        ("cosine", 35, 0.853553),
        ("cosine", 60, 0.5),
        ("cosine", 110, 0.0),
        ("cosine", 999, 0.0),
    ],
)
def test_learning_rate_values(schedule, step, expected):
    training = TrainingConfig(steps=110, warmup_steps=10, schedule=schedule)
    assert learning_rate_scale(step, training) == pytest.approx(expected, abs=1e-6)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate_scale(0, TrainingConfig(steps=10, warmup_steps=0)) == 1.0


def test_groups_split_by_shape_and_name():
    model = Regression()
    groups = parameter_groups(model, TrainingConfig(optimizer="muon", weight_decay=0.1))
    by_kind = {(group["use_muon"], group["weight_decay"]): group["params"] for group in groups}
    assert {id(p) for p in by_kind[True, 0.1]} == {id(model.middle.weight), id(model.hidden.weight)}
    assert {id(p) for p in by_kind[False, 0.1]} == {id(model.entry.weight), id(model.exit.weight)}
    assert len(by_kind[False, 0.0]) == 4  # biases; the frozen layer is in no group
    assert sum(len(group["params"]) for group in groups) == 8
    assert all(not group["use_muon"] for group in parameter_groups(model, TrainingConfig(optimizer="adamw")))


def test_embeddings_are_not_for_muon():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    groups = parameter_groups(model, TrainingConfig(optimizer="muon"))
    assert [id(p) for p in groups[0]["params"]] == [id(model[1].weight)]


@pytest.mark.parametrize("shape", [(16, 16), (16, 60), (60, 16)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 37.0
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.max() < 1.3
    assert values.median() > 0.65


def test_wide_and_plain_iteration_agree():
    """The iteration on X·Xᵀ is the quintic one on X, up to rounding."""
    x = torch.randn(12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
    expected = x / x.norm()
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    assert torch.allclose(orthogonalized(x), expected, atol=2e-3)


def test_convolution_steps_like_its_matrix():
    grad = torch.randn(16, 3, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    flat = muon_update(grad.flatten(1).clone(), torch.zeros(16, 54))
    assert torch.equal(muon_update(grad, torch.zeros_like(grad)), flat.view_as(grad))


def test_nan_gradient_leaves_the_momentum_alone():
    momentum = torch.ones(4, 4)
    assert muon_update(torch.full((4, 4), float("nan")), momentum).isnan().all()
    assert torch.equal(momentum, torch.ones(4, 4))


def test_many_weights_at_once_step_as_each_alone():
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 48), (16, 16), (48, 16), (16, 3, 4, 4), (16, 48)]
    grads, momenta = [torch.randn(shape) for shape in shapes], [torch.randn(shape) for shape in shapes]
    alone_momenta = [momentum.clone() for momentum in momenta]
    alone = [muon_update(grad, momentum) for grad, momentum in zip(grads, alone_momenta, strict=True)]
    together = muon_updates(grads, momenta)
    for one, other in zip([*alone, *alone_momenta], [*together, *momenta], strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=2e-5)


def test_muon_fits_a_convolution_and_decays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    target = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 4))
    training = TrainingConfig(optimizer="muon", weight_decay=0.01)
    (optimizer, adamw) = build_optimizers(parameter_groups(model, training))
    assert len(optimizer.param_groups[0]["params"]) == 2
    x = torch.randn(32, 3, 6, 6)
    losses = []
    for _ in range(60):
        loss = (model(x) - target(x).detach()).square().mean()
        losses.append(float(loss))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        adamw.step()
    assert losses[-1] < 0.2 * losses[0]


def test_average_warms_up_and_follows_what_trains():
    model = Regression()
    average = WeightAverage(whole_parameters(model), 0.9)
    start = model.hidden.weight.detach().clone()
    with torch.no_grad():
        model.hidden.weight.add_(1.0)
    average.update(0)  # decay (1 + 0) / (10 + 0)
    found = {piece.name: piece for piece in average.pieces}
    assert torch.allclose(found["hidden.weight"].values.view_as(start), start + 0.9)
    assert "frozen.weight" not in found and found["hidden.weight"].key == "average"
    average.update(1000)  # at least a tenth of what is new
    assert torch.allclose(found["hidden.weight"].values.view_as(start), start + 0.91)
