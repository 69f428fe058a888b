"""Rectified flow: exact on straight paths, frozen frames stay, NaN lengths are refused."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.diffusion.rectified_flow import (
    add_noise,
    euler_sample,
    latents_for_time,
    sample_times,
    schedule,
    time_ratio,
)


def test_the_true_velocity_leads_back_to_the_data() -> None:
    x0, noise = torch.randn(2, 3, 5, 4, 4), torch.randn(2, 3, 5, 4, 4)
    for steps in (1, 3, 10):
        out = euler_sample(lambda x, t: x0 - noise, noise, schedule(steps, 0.7))
        assert torch.allclose(out, x0, atol=1e-4)


def test_a_later_start_leads_back_to_the_data_in_the_same_steps() -> None:
    x0, noise = torch.randn(1, 3, 5, 4, 4), torch.randn(1, 3, 5, 4, 4)
    times = schedule(4, 0.7, start=0.6)
    assert len(times) == 4 and times[0] < schedule(4, 0.7)[0]
    begin = add_noise(x0, noise, torch.tensor([times[0]]))
    assert torch.allclose(euler_sample(lambda x, t: x0 - noise, begin, times), x0, atol=1e-4)


def test_noise_at_the_ends_of_time() -> None:
    x0, noise = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    mixed = add_noise(x0, noise, torch.tensor([0.0, 1000.0]))
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[1], noise[1])


def test_frozen_frames_stay_exactly() -> None:
    given, noise = torch.randn(1, 2, 6, 2, 2), torch.randn(1, 2, 6, 2, 2)
    to_make = torch.tensor([[False, False, True, True, True, True]])
    seen = []

    def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(x[:, :, :2].clone())
        return torch.ones_like(x)

    out = euler_sample(velocity, noise, schedule(4, 1.0), (to_make, given))
    assert torch.equal(out[:, :, :2], given[:, :, :2])
    assert all(torch.equal(frames, given[:, :, :2]) for frames in seen)
    assert torch.allclose(out[:, :, 2:], noise[:, :, 2:] + 1.0, atol=1e-5)


def test_times_fall_from_noise_to_data_and_follow_the_ratio() -> None:
    assert schedule(4, 1.0) == pytest.approx([1000, 750, 500, 250])
    assert all(a < b for a, b in zip(schedule(4, 1.0)[1:], schedule(4, 2.0)[1:], strict=True))
    assert time_ratio(512, 512, 1) == 1.0
    generator = torch.Generator().manual_seed(0)
    times = sample_times(4000, 1.0, generator, torch.device("cpu"))
    assert float(times.min()) > 0 and float(times.max()) < 1000
    assert float(times.median()) == pytest.approx(500, abs=20)


def test_lengths_without_a_latent_are_refused() -> None:
    assert [latents_for_time(frames) for frames in (1, 17, 18, 51, 408)] == [1, 5, 5, 15, 120]
    for frames in (0, 2, 16):
        with pytest.raises(ValueError, match=r"works for 1 frame \(a picture\), 17, 34"):
            latents_for_time(frames)
    with pytest.raises(ValueError, match="at least 1"):
        time_ratio(512, 512, 0)
