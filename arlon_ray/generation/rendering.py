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
from arlon_ray.generation.storyboard import SegmentText
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


def _given_latents(name: str, latents: np.ndarray | None, sizes: tuple[int, int, int], most: int | None = None) -> int:
    """How many latent frames are given. Raises ValueError if they are not [C, 1 to `most`, h, w]."""
    if latents is None:
        return 0
    channels, height, width = sizes
    count = latents.shape[1] if latents.ndim == 4 else 0
    if latents.shape != (channels, count, height, width) or not 1 <= count <= (most or count):
        expected = f"[{channels}, {f'1 to {most}' if most else 'n'}, {height}, {width}]"
        raise ValueError(f"{name} of shape {list(latents.shape)}: expected {expected}")
    return count


def guided_velocity(
    dit: STDiT3,
    latent_shape: tuple[int, int, int],
    text: tuple[Tensor, Tensor],
    coarse_1Cthw: Tensor | None,
    noisy_1t: Tensor | None,
    fps: float,
    size: tuple[int, int],
    options: GenerationOptions,
    shares_Vt: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity field of one segment, with text and token guidance of their own scales.

    v = v(text, tokens) + (s_text − 1)·(v(text, tokens) − v(null, tokens))
      + (s_token − 1)·(v(text, tokens) − v(text)).
    With several texts [V, L, E], v(text, ·) of a latent frame is their mean, weighted by `shares_Vt`. The branches are
    one batch; a scale of 1 needs no branch. Everything constant is computed here, once.
    """
    values, mask = text
    texts = list(range(len(values)))
    null = dit.y_embedder.y_embedding[: values.shape[1]]
    #: (text, or None for the null text; whether the tokens are seen), and how many branches each term has
    branches: list[tuple[int | None, bool]] = [(v, coarse_1Cthw is not None) for v in texts]
    terms, weights = [len(texts)], list[float]()
    if options.guidance_scale != 1.0:
        branches.append((None, coarse_1Cthw is not None))
        terms, weights = [*terms, 1], [*weights, options.guidance_scale - 1.0]
    if coarse_1Cthw is not None and options.token_guidance_scale != 1.0:
        branches += [(v, False) for v in texts]
        terms, weights = [*terms, len(texts)], [*weights, options.token_guidance_scale - 1.0]
    count = len(branches)
    condition = dit.condition(
        latent_shape,
        torch.stack([null if v is None else values[v] for v, _ in branches]),
        # the null text is as long as the text that comes in
        torch.stack([mask[-1 if v is None else v] for v, _ in branches]),
        values.new_full((count,), fps),
        size,
        None if coarse_1Cthw is None else coarse_1Cthw.expand(count, -1, -1, -1, -1),
        torch.tensor([seen for _, seen in branches], device=values.device),
    )
    noisy = None if noisy_1t is None else noisy_1t.expand(count, -1)

    def mean(of_texts: Tensor) -> Tensor:
        return of_texts if len(of_texts) == 1 else torch.einsum("vt,vcthw->cthw", shares_Vt, of_texts)[None]

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        output = dit(x.expand(count, -1, -1, -1, -1), time.expand(count), condition, noisy)
        both, *others = (mean(part) for part in dit.velocity(output).split(terms))
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
        prompt: SegmentText,
        tokens: np.ndarray | None,
        overlap: np.ndarray | None,
        seed: int,
        index: int,
        options: GenerationOptions,
        on_step: Callable[[int], None] | None = None,
        after: np.ndarray | None = None,
    ) -> SegmentLatents:
        """Render segment `index`: `tokens` [t', h', w'] (None with `options.baseline`), `overlap` float32 [C, k, h, w].

        `overlap` is what the segment before ended with, or what the first one starts from (`Given`; None: nothing), at
        most the overlap's o latents. `after` [C, m, h, w], whole groups, is what comes behind the segment, where that
        is there already: then the tokens are those of t + m latents. Both stay exactly as they are, and are not part of
        what is returned. `on_step(i)` is called before every denoising step and may raise. Raises ValueError on shapes
        that do not fit.
        """
        device, segment = self.bundle.device, self.config.segment
        height, width = self.config.latent_grid
        channels = self.dit.config.in_channels
        kept = _given_latents("overlap", overlap, (channels, height, width), segment.overlap_latents)
        behind = _given_latents("after", after, (channels, height, width))
        if behind % GROUP_LATENTS:
            raise ValueError(f"after has {behind} latent frames: expected whole groups of {GROUP_LATENTS}")
        shape = (segment.latents + behind, height, width)
        coarse = None if options.baseline else self._coarse(tokens, shape[0])
        given = torch.zeros(1, channels, *shape, device=device)
        noisy = torch.ones(1, shape[0], dtype=torch.bool, device=device)
        for known, where in ((overlap, slice(kept)), (after, slice(segment.latents, None))):
            if known is not None:
                given[0, :, where] = torch.from_numpy(known).to(device)
                noisy[:, where] = False
        size = (self.config.video.height, self.config.video.width)
        model = self.bundle.baseline if options.baseline else self.dit
        mask = None if noisy.all() else noisy
        text, shares = self._encoded(prompt, behind)
        velocity = guided_velocity(model, shape, text, coarse, mask, self.config.video.fps, size, options, shares)
        generator = segment_generator(seed, index, "dit", device)
        noise = torch.randn(given.shape, generator=generator, device=device)
        ratio = time_ratio(*size, shape[0], self.config.dit.time_base_pixels) * self.config.dit.time_scale
        times = schedule(options.steps, ratio, options.start)
        if options.start < 1.0:
            if coarse is None:
                raise ValueError(f"start={options.start}: the baseline has no tokens to start from; expected 1")
            noise = add_noise(coarse, noise, noise.new_full((1,), times[0]))
        latents = euler_sample(velocity, noise, times, None if mask is None else (mask, given), on_step)
        return SegmentLatents(index, latents[0, :, kept : segment.latents].cpu().numpy())

    def _encoded(self, text: SegmentText, behind: int) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Embeddings [V, L, E] and mask [V, L] of a segment's texts, and their shares of each latent frame.

        `behind`: frames that are given behind the segment's, which have the shares of its last one.
        """
        if isinstance(text, str):
            return self.text.encode([text]), None
        shares = torch.tensor(text.shares, device=self.bundle.device)
        return self.text.encode(list(text.prompts)), torch.cat([shares, shares[:, -1:].expand(-1, behind)], 1)

    def _coarse(self, tokens: np.ndarray | None, latents: int) -> Tensor:
        if self.codec is None:
            raise ValueError("this bundle is text-only: ask for the baseline")
        if tokens is None:
            raise ValueError("no tokens: the guided DiT needs the AR's plan; ask for the baseline to render without")
        expected = self.codec.grid(latents, *self.config.latent_grid)
        if tokens.shape != expected:
            raise ValueError(f"tokens of shape {list(tokens.shape)}: expected {list(expected)}")
        return self.codec.decode(torch.from_numpy(tokens)[None].long().to(self.bundle.device), self.config.latent_grid)
