"""The DiT renders one segment's new latents, guided by its tokens and held to the overlap with the one before.

Legend: C latent channels, t latent frames of a segment, o of them the overlap, n = t − o new, h×w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_LATENTS
from arlon_ray.diffusion.rectified_flow import add_noise, euler_sample, schedule, time_ratio
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.seeds import segment_generator
from arlon_ray.models.dit import STDiT3


@dataclass(frozen=True)
class SegmentLatents:
    """One segment's new latents, float32 [C, n, h, w]."""

    index: int
    latents: np.ndarray


def behind_overlap(overlap: np.ndarray | None, latents: np.ndarray) -> np.ndarray:
    """A segment's new latents [C, n, h, w] behind what it took over; its end is what the next segment takes over.

    New latents may be fewer than an overlap: the rest then comes from what was taken over.
    """
    return latents if overlap is None else np.concatenate([overlap, latents], axis=1)


def guided_velocity(
    dit: STDiT3,
    latent_shape: tuple[int, int, int],
    text: tuple[Tensor, Tensor],
    coarse_1Cthw: Tensor | None,
    noisy_1t: Tensor | None,
    fps: float,
    size: tuple[int, int],
    options: GenerationOptions,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity field of one segment, with text and token guidance of their own scales.

    v = v(text, tokens) + (s_text − 1)·(v(text, tokens) − v(null, tokens))
      + (s_token − 1)·(v(text, tokens) − v(text)).
    The branches are one batch; a scale of 1 needs no branch. Everything constant is computed here, once.
    """
    with_text, with_tokens, weights = [True], [coarse_1Cthw is not None], []
    if options.guidance_scale != 1.0:
        with_text, with_tokens = [*with_text, False], [*with_tokens, coarse_1Cthw is not None]
        weights.append(options.guidance_scale - 1.0)
    if coarse_1Cthw is not None and options.token_guidance_scale != 1.0:
        with_text, with_tokens = [*with_text, True], [*with_tokens, False]
        weights.append(options.token_guidance_scale - 1.0)
    branches = len(with_text)
    values, mask = text
    null = dit.y_embedder.y_embedding[: values.shape[1]]
    condition = dit.condition(
        latent_shape,
        torch.stack([values[0] if keep else null for keep in with_text]),
        mask.expand(branches, -1),
        values.new_full((branches,), fps),
        size,
        None if coarse_1Cthw is None else coarse_1Cthw.expand(branches, -1, -1, -1, -1),
        torch.tensor(with_tokens, device=values.device),
    )
    noisy = None if noisy_1t is None else noisy_1t.expand(branches, -1)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        output = dit(x.expand(branches, -1, -1, -1, -1), time.expand(branches), condition, noisy)
        both, *others = dit.velocity(output).split(1)
        guidance = (w * (both - other) for w, other in zip(weights, others, strict=True))
        return sum(guidance, both)

    return velocity


class DiTRenderer:
    """Renders segments of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.text = bundle.text
        self.codec = bundle.codec if bundle.guided else None
        self.dit = bundle.dit if bundle.guided else bundle.baseline

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | torch.device = "cpu") -> DiTRenderer:
        """Open a bundle and load what rendering needs."""
        return cls(load_bundle(path, device))

    @torch.no_grad()
    def render(
        self,
        prompt: str,
        tokens: np.ndarray | None,
        overlap: np.ndarray | None,
        seed: int,
        index: int,
        options: GenerationOptions,
        on_step: Callable[[int], None] | None = None,
    ) -> SegmentLatents:
        """Render segment `index`: `tokens` [t', h', w'] (None with `options.baseline`), `overlap` float32 [C, k, h, w].

        `overlap` is what the segment before ended with, or what the first one starts from (`Given`; None: nothing), at
        most the overlap's o latents. It stays exactly as it is, and is not part of what is returned. `on_step(i)` is
        called before every denoising step and may raise. Raises ValueError on shapes that do not fit.
        """
        device, segment = self.bundle.device, self.config.segment
        height, width = self.config.latent_grid
        kept = 0 if overlap is None else overlap.shape[1]
        shape = (segment.latents, height, width)
        channels = self.dit.config.in_channels
        if overlap is not None and not (
            1 <= kept <= segment.overlap_latents and overlap.shape == (channels, kept, height, width)
        ):
            expected = f"[{channels}, 1 to {segment.overlap_latents}, {height}, {width}]"
            raise ValueError(f"overlap of shape {list(overlap.shape)}: expected {expected}")
        coarse = None if options.baseline else self._coarse(tokens)
        given = torch.zeros(1, channels, *shape, device=device)
        noisy = torch.ones(1, segment.latents, dtype=torch.bool, device=device)
        if overlap is not None:
            given[0, :, :kept] = torch.from_numpy(overlap).to(device)
            noisy[:, :kept] = False
        size = (self.config.video.height, self.config.video.width)
        model = self.bundle.baseline if options.baseline else self.dit
        frozen = (noisy, given) if kept else None
        text, fps = self.text.encode([prompt]), self.config.video.fps
        velocity = guided_velocity(model, shape, text, coarse, noisy if kept else None, fps, size, options)
        generator = segment_generator(seed, index, "dit", device)
        noise = torch.randn(given.shape, generator=generator, device=device)
        ratio = time_ratio(*size, segment.latents, self.config.dit.time_base_pixels) * self.config.dit.time_scale
        times = schedule(options.steps, ratio, options.start)
        if options.start < 1.0:
            if coarse is None:
                raise ValueError(f"start={options.start}: the baseline has no tokens to start from; expected 1")
            noise = add_noise(coarse, noise, noise.new_full((1,), times[0]))
        latents = euler_sample(velocity, noise, times, frozen, on_step)
        return SegmentLatents(index, latents[0, :, kept:].cpu().numpy())

    def _coarse(self, tokens: np.ndarray | None) -> Tensor:
        if self.codec is None:
            raise ValueError("this bundle is text-only: ask for the baseline")
        if tokens is None:
            raise ValueError("no tokens: the guided DiT needs the AR's plan; ask for the baseline to render without")
        expected = self.codec.grid(self.config.segment.groups * GROUP_LATENTS, *self.config.latent_grid)
        if tokens.shape != expected:
            raise ValueError(f"tokens of shape {list(tokens.shape)}: expected {list(expected)}")
        return self.codec.decode(torch.from_numpy(tokens)[None].long().to(self.bundle.device), self.config.latent_grid)
