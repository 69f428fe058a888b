"""Rectified flow: times and noise; NaN lengths are refused."""

from __future__ import annotations

import pytest
import torch

from arlon_ray.diffusion.rectified_flow import (
    add_noise,
    latents_for_time,
    sample_times,
    schedule,
    time_ratio,
)


def test_noise_at_the_ends_of_time() -> None:
    x0, noise = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    mixed = add_noise(x0, noise, torch.tensor([0.0, 1000.0]))
    assert torch.equal(mixed[0], x0[0]) and torch.equal(mixed[1], noise[1])


def test_times_fall_from_noise_to_data_and_follow_the_ratio() -> None:
    assert schedule(4, 1.0) == pytest.approx([1000, 750, 500, 250])
    assert all(a < b for a, b in zip(schedule(4, 1.0)[1:], schedule(4, 2.0)[1:], strict=True))
    assert time_ratio(512, 512, 1) == 1.0
    assert all(schedule(4, ratio / 97)[0] <= 1000 for ratio in range(1, 400))
    late = schedule(4, 0.7, start=0.6)
    assert len(late) == 4 and late[0] < schedule(4, 0.7)[0]
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
