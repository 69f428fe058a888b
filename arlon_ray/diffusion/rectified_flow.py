"""Rectified flow as in Open-Sora v1.2: straight paths from data (time 0) to noise (time 1000).

x_t = (1 − t)·x0 + t·noise with t = time/1000; the model learns the velocity x0 − noise.
Legend: B batch, C latent channels, t×h×w latent grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_TIMES = 1000.0


def latents_for_time(frames: int) -> int:
    """Latent frames as Open-Sora's time-step transform counts them: 1 for a picture, else frames // 17 · 5.

    Raises ValueError for 0 and for 2–16 frames, for which that is 0 (and every time would become 0, then NaN).
    """
    if frames != 1 and frames < 17:
        raise ValueError(
            f"{frames} frames: the time-step transform works for 1 frame (a picture), 17, 34, 51, … frames"
        )
    return 1 if frames == 1 else frames // 17 * 5


def time_ratio(height: float, width: float, latent_frames: int, base_pixels: float = 512 * 512) -> float:
    """r = √(H·W / base) · √(latent frames): larger and longer videos are trained and sampled at noisier times.

    Raises ValueError if there is no latent frame (Open-Sora's own formula gives r = 0, then NaN, for 2–16 frames).
    """
    if latent_frames < 1:
        raise ValueError(f"{latent_frames} latent frames: the time-step transform needs at least 1 (1 or 17·n frames)")
    return math.sqrt(height * width / base_pixels) * math.sqrt(latent_frames)


def transform_time(time: Tensor, ratio: float) -> Tensor:
    """t' = r·t / (1 + (r − 1)·t), on times in [0, 1000]."""
    t = time / NUM_TIMES
    return NUM_TIMES * ratio * t / (1.0 + (ratio - 1.0) * t)


def sample_times(count: int, ratio: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Training times [count] in (0, 1000): logit-normal, then transformed."""
    t = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    return transform_time(NUM_TIMES * t, ratio)


def add_noise(x0_BCthw: Tensor, noise_BCthw: Tensor, time_B: Tensor) -> Tensor:
    """x_t at times [B] in [0, 1000]."""
    t = (time_B / NUM_TIMES)[:, None, None, None, None]
    return (1.0 - t) * x0_BCthw + t * noise_BCthw


def schedule(steps: int, ratio: float, start: float = 1.0) -> list[float]:
    """Times of `steps` steps from `start` (1: pure noise) on, noisiest first; the last step ends at 0."""
    times = torch.tensor([start * (1.0 - i / steps) * NUM_TIMES for i in range(steps)], dtype=torch.float64)
    # rounding must not make the first one later than noise
    return transform_time(times, ratio).clamp(max=NUM_TIMES).tolist()
