"""Solvers: their orders where the solution is known, exact on straight paths, frozen frames stay, evaluations count."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from arlon_ray.config import SamplingConfig, Solver
from arlon_ray.diffusion.rectified_flow import add_noise, schedule
from arlon_ray.diffusion.solvers import FlowPath, sample_flow

SOLVERS = get_args(Solver)
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "ab2": 2, "dpm2m": 2}


def error(solver: Solver, times: list[float], end: float = 0.0) -> float:
    """Largest distance at time `end` from the solution of dx/dτ = −x²·cos 3τ, which is 1/x = c + sin(3τ)/3."""
    x = torch.linspace(0.3, 1.2, 8, dtype=torch.float64).view(1, 1, 2, 2, 2)
    expected = 1 / (1 / x + (math.sin(3 * end / 1000) - math.sin(3 * times[0] / 1000)) / 3)
    path = FlowPath(x, times, None, solver)
    while not path.ended and path.time > end:
        path.advance(path.x**2 * math.cos(3 * path.time / 1000))
    return float((path.x - expected).abs().max())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("ratio", "start"), [(1.0, 1.0), (3.2, 1.0), (0.7, 0.6)])
def test_each_solver_has_its_order(solver: Solver, ratio: float, start: float) -> None:
    """Twice the steps divide the error by 2 to the order: with equal steps, transformed times, and a late start."""
    few, many = (error(solver, schedule(steps, ratio, start)) for steps in (256, 512))
    if solver == "dpm2m":  # the logarithm at the ends
        assert 1.5 < math.log2(few / many) < 2
    else:
        assert math.log2(few / many) == pytest.approx(ORDERS[solver], abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_between_the_ends_each_has_its_order(solver: Solver) -> None:
    few, many = (error(solver, torch.linspace(900, 400, n + 1).tolist(), 400.0) for n in (64, 128))
    assert math.log2(few / many) == pytest.approx(ORDERS[solver], abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_true_velocity_leads_back_to_the_data(solver: Solver) -> None:
    x0, noise = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 5, 4, 4)
    for steps in (1, 2, 3, 10):
        out = sample_flow(lambda x, t: x0 - noise, noise, schedule(steps, 0.7), None, solver)
        assert torch.allclose(out, x0, atol=1e-4)
        times = schedule(steps, 0.7, start=0.6)
        begin = add_noise(x0, noise, torch.tensor([times[0]]))
        assert torch.allclose(sample_flow(lambda x, t: x0 - noise, begin, times, None, solver), x0, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_frozen_frames_stay_exactly(solver: Solver) -> None:
    given, noise = torch.randn(1, 2, 6, 2, 2), torch.randn(1, 2, 6, 2, 2)
    to_make = torch.tensor([[False, False, True, True, True, True]])
    seen = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x[:, :, :2].clone())
        return torch.sin(3 * x + time / 100)

    out = sample_flow(velocity, noise, schedule(4, 1.3), (to_make, given), solver)
    assert torch.equal(out[:, :, :2], given[:, :, :2])
    assert all(torch.equal(frames, given[:, :, :2]) for frames in seen)
    free = sample_flow(
        velocity, torch.where(to_make[:, None, :, None, None], noise, given), schedule(4, 1.3), None, solver
    )
    assert torch.equal(out[:, :, 2:], free[:, :, 2:]) and not torch.equal(free[:, :, :2], given[:, :, :2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_as_many_as_the_options_say(solver: Solver) -> None:
    for steps in (1, 2, 5):
        times = schedule(steps, 1.0)
        path, asked = FlowPath(torch.zeros(1, 1, 1, 1, 1), times, None, solver), []
        while not path.ended:
            asked.append(path.time)
            path.advance(torch.zeros(1, 1, 1, 1, 1))
        assert len(asked) == path.evaluations == SamplingConfig(steps=steps, solver=solver).evaluations
        assert set(times) <= set(asked) and asked == sorted(asked, reverse=True) and min(asked) > 0


def test_steps_by_hand() -> None:
    """Two steps of 0.6 and 0.4 of each formula, with a velocity that a person can follow: v = x·τ, from 2."""
    begin = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64)

    def end(solver: Solver) -> float:
        return float(sample_flow(lambda x, time: x * time / 1000, begin, [1000.0, 400.0], None, solver))

    # 2 + 2·0.6 = 3.2, 3.2 + 1.28·0.4
    assert end("euler") == end("dpm2m") == pytest.approx(3.712)
    # 2 + 2.6·0.7·0.6 = 3.092, 3.092 + 3.33936·0.2·0.4
    assert end("midpoint") == pytest.approx(3.3591488)
    # 2 + (2 + 1.28)·0.3 = 2.984, then Euler: 2.984 + 1.1936·0.4
    assert end("heun") == pytest.approx(3.46144)
    # 3.2, 3.712 + 0.4²/1.2·(1.28 − 2)
    assert end("ab2") == pytest.approx(3.616)


def test_dpm2m_is_what_the_paper_writes() -> None:
    """x' = σ'/σ·x − α'·(e^(−h) − 1)·((1 + 1/2r)·D − 1/2r·D⁻), h = λ' − λ, r = h⁻/h: DPM-Solver++(2M), algorithm 2."""
    times = [900.0, 700.0, 400.0, 150.0]
    expected = x = torch.full((1, 1, 1, 1, 1), 2.0, dtype=torch.float64)
    taus, data, h = [time / 1000 for time in times], list[Tensor](), list[float]()
    for tau, following in pairwise(taus):
        h.append(math.log((1 - following) / following) - math.log((1 - tau) / tau))
        data.append(expected + tau * torch.sin(3 * expected + tau))
        guess = data[-1]
        if len(h) > 1:
            r = h[-2] / h[-1]
            guess = (1 + 1 / (2 * r)) * data[-1] - data[-2] / (2 * r)
        expected = following / tau * expected - (1 - following) * math.expm1(-h[-1]) * guess
    path = FlowPath(x, times, None, "dpm2m")
    for _ in range(3):
        path.advance(torch.sin(3 * path.x + path.time / 1000))
    assert torch.allclose(path.x, expected, rtol=1e-12)
