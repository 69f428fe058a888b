"""Which frames of a training sample are given and which carry noise: `x_mask` of Open-Sora v1.2, with its forms.

Legend: B batch, t latent frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arlon_ray.config import FrameMaskConfig

FORMS = tuple(FrameMaskConfig.model_fields)


def sample_noisy(
    shares: FrameMaskConfig,
    count: int,
    frames: int,
    overlap: int,
    generator: torch.Generator | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw a form for each of `count` samples: [B, t] bool, True: the frame carries noise. At least one always does.

    `overlap` is the number of latent frames that a segment takes over. As at Open-Sora, a clip of fewer than 8 latent
    frames is given none in its forms; likewise one that is no longer than the overlap.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    limits = torch.tensor([getattr(shares, name) for name in FORMS], device=device).cumsum(0)
    form = torch.bucketize(uniform(count), limits, right=True)
    forms = {name: (form == i)[:, None] for i, name in enumerate(FORMS)}
    at = torch.arange(frames, device=device)

    given = torch.zeros(count, frames, dtype=torch.bool, device=device)
    if frames > overlap:
        given |= forms["overlap"] & (at < overlap)
    longest = frames // 4
    if longest > 1:
        of_one = torch.ones(count, 1, device=device)
        of_quarter = 1 + (uniform(count, 1) * longest).floor()
        place = uniform(count, 1)
        for name, size in (("quarter", of_quarter), ("image", of_one)):
            start = (place * (frames - size + 1)).floor()
            head, tail = at < size, at >= frames - size
            given |= forms[f"{name}_random"] & (at >= start) & (at < start + size)
            given |= forms[f"{name}_head"] & head
            given |= forms[f"{name}_tail"] & tail
            given |= forms[f"{name}_head_tail"] & (head | tail)
        given |= forms["interpolate"] & (at % 2 == (uniform(count, 1) < 0.5))
        given |= forms["random"] & (uniform(count, frames) < 0.1 + 0.8 * uniform(count, 1))
    given[:, -1] &= ~given.all(1)
    return ~given
