"""Solvers of the flow's equation dx/dτ = −v(x, τ) from noise (τ = 1) to data (τ = 0); v ≈ x0 − noise, τ = time/1000.

A step goes from τ to τ' over h = τ − τ'. v, v⁻ are the velocities at the beginning of this step and of the one before,
h⁻ is that one's length, D = x + τ·v the data that a velocity predicts, λ = ln((1 − τ)/τ). One step of each:

    euler     x + h·v                                           order 1, 1 evaluation of v a step
    midpoint  x + h·v(x + h/2·v, τ − h/2)                       order 2, 2 evaluations
    heun      x + h/2·(v + v(x + h·v, τ'))                      order 2, 2 evaluations; the last step is Euler's
    ab2       x + h·v + h²/(2h⁻)·(v − v⁻)                       order 2, 1 evaluation; the first step is Euler's
    dpm2m     x + h·v + (h/τ)·(λ' − λ)/(2(λ − λ⁻))·(D − D⁻)     order 2 (at the ends h²·ln h: λ is infinite there),
                                                                1 evaluation; the first and the last step are Euler's

midpoint, heun and ab2 (Adams–Bashforth, steps of any length): Hairer, Nørsett & Wanner, Solving Ordinary Differential
Equations I, II.1 and III.5; that heun's last step asks for no velocity at τ = 0 is of Karras et al. 2022, algorithm 1.
dpm2m: DPM-Solver++(2M), Lu et al. 2022, algorithm 2, with the flow's α = 1 − τ and σ = τ, for which its first order,
σ'/σ·x + α'·(1 − e^(λ − λ'))·D, is Euler's step: what is left of the second is the term above.

Legend: B batch, C latent channels, t×h×w latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from arlon_ray.config import Solver
from arlon_ray.diffusion.rectified_flow import NUM_TIMES

#: Yields where it wants the velocity (x and its time in [0, 1000]), is sent it, and returns the data.
Solving = Generator[tuple[Tensor, float], Tensor, Tensor]


def _steps(times: list[float]) -> Iterator[tuple[float, float, float]]:
    """Of each step: the time where it begins, the time where it ends, and h."""
    for time, following in pairwise([*times, 0.0]):
        yield time, following, (time - following) / NUM_TIMES


def _euler(x: Tensor, times: list[float]) -> Solving:
    for time, _, h in _steps(times):
        x = x + (yield x, time) * h
    return x


def _midpoint(x: Tensor, times: list[float]) -> Solving:
    for time, following, h in _steps(times):
        velocity = yield x, time
        x = x + (yield x + velocity * (h / 2), (time + following) / 2) * h
    return x


def _heun(x: Tensor, times: list[float]) -> Solving:
    for time, following, h in _steps(times):
        velocity = yield x, time
        reached = x + velocity * h
        x = x + (velocity + (yield reached, following)) * (h / 2) if following else reached
    return x


def _ab2(x: Tensor, times: list[float]) -> Solving:
    before: tuple[Tensor, float] | None = None
    for time, _, h in _steps(times):
        velocity = yield x, time
        x = x + velocity * h
        if before is not None:
            x = x + (velocity - before[0]) * (h**2 / (2 * before[1]))
        before = velocity, h
    return x


def _dpm2m(x: Tensor, times: list[float]) -> Solving:
    before: tuple[Tensor, float] | None = None
    for time, following, h in _steps(times):
        velocity = yield x, time
        data = x + velocity * (time / NUM_TIMES)
        x = x + velocity * h
        if before is not None and following:
            ratio = (_half_log_snr(following) - _half_log_snr(time)) / (_half_log_snr(time) - _half_log_snr(before[1]))
            x = x + (data - before[0]) * ((1 - following / time) * ratio / 2)
        before = data, time
    return x


def _half_log_snr(time: float) -> float:
    """λ = ln(α/σ) at a time in (0, 1000]; −∞ for pure noise."""
    return math.log((NUM_TIMES - time) / time) if time < NUM_TIMES else -math.inf


SOLVERS: dict[Solver, Callable[[Tensor, list[float]], Solving]] = {
    "euler": _euler, "midpoint": _midpoint, "heun": _heun, "ab2": _ab2, "dpm2m": _dpm2m,
}  # fmt: skip
assert set(SOLVERS) == set(get_args(Solver))


class FlowPath:
    """One sample on its way from noise to data, an evaluation at a time: `x` [B, C, t, h, w] is where its velocity is
    wanted, at `time`, and, when it has `ended`, the data.

    `times` in (0, 1000], noisiest first (`schedule`). `frozen` = (mask [B, t] bool, True: a frame to make; latents
    [B, C, t, h, w] of the frames that are given): those stay exactly as they are.
    """

    def __init__(
        self,
        noise_BCthw: Tensor,
        times: list[float],
        frozen: tuple[Tensor, Tensor] | None = None,
        solver: Solver = "euler",
    ) -> None:
        x, self._to_make = noise_BCthw, None if frozen is None else frozen[0][:, None, :, None, None]
        if frozen is not None:
            x = torch.where(self._to_make, x, frozen[1])  # type: ignore[arg-type]
        #: How many velocities it has been given.
        self.evaluations, self.ended = 0, False
        self._solving = SOLVERS[solver](x, times)
        self.x, self.time = next(self._solving)

    @property
    def time_B(self) -> Tensor:
        """The time of each sample of `x`."""
        return self.x.new_full((len(self.x),), self.time)

    def advance(self, velocity_BCthw: Tensor) -> None:
        """Go on, with the velocity at `x` and its time."""
        if self._to_make is not None:
            # what does not move keeps every bit: each formula above adds velocities, or their differences, to x
            velocity_BCthw = torch.where(self._to_make, velocity_BCthw, 0.0)
        self.evaluations += 1
        try:
            self.x, self.time = self._solving.send(velocity_BCthw)
        except StopIteration as end:
            self.x, self.ended = end.value, True


def sample_flow(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise_BCthw: Tensor,
    times: list[float],
    frozen: tuple[Tensor, Tensor] | None = None,
    solver: Solver = "euler",
) -> Tensor:
    """Follow `velocity(x, time [B])` from noise to data. Returns [B, C, t, h, w]; see `FlowPath`."""
    path = FlowPath(noise_BCthw, times, frozen, solver)
    while not path.ended:
        path.advance(velocity(path.x, path.time_B))
    return path.x
