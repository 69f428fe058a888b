"""A long video in one process: plan, render, decode, segment by segment, on a constant budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation.decoding import FrameDecoder
from arlon_ray.generation.given import Given
from arlon_ray.generation.options import GenerationOptions, default_options
from arlon_ray.generation.planning import ArPlanner, SegmentTokens
from arlon_ray.generation.rendering import DiTRenderer, behind_overlap


def spread_prompts(prompts: Sequence[str], segments: int) -> list[str]:
    """A prompt for each of `segments`, in order and evenly. Raises ValueError if a prompt gets no segment."""
    if not prompts or segments < len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {segments} segments: expected 1 prompt to {segments}")
    return [prompts[i * len(prompts) // segments] for i in range(segments)]


class VideoGenerator:
    """Text in, frames out: `for frames in VideoGenerator.from_bundle(path).generate(prompts, seed=0): …`."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.planner = ArPlanner(bundle) if bundle.guided else None
        self.renderer, self.decoder = DiTRenderer(bundle), FrameDecoder(bundle)

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | torch.device = "cpu") -> VideoGenerator:
        """Open a bundle. Raises ArtifactError."""
        return cls(load_bundle(path, device))

    def generate(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        options: GenerationOptions | None = None,
        given: Given | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames uint8 [T, H, W, 3] of one segment after the other; prompts[k] is the text of segment k.

        `given` is what the first segment starts from (`given_picture`, `given_clip`). A text-only bundle renders the
        baseline whatever the options say.
        """
        options = options or default_options(self.bundle.config.sampling)
        keep = self.bundle.config.segment.overlap_latents
        start = given.latents if given else None
        if self.planner is None:
            options = options.model_copy(update={"baseline": True})
        plans: Iterator[SegmentTokens] = iter(())
        if self.planner is not None and not options.baseline:
            plans = self.planner.plan(prompts, seed, options, given=start)
        overlap = start
        for index, prompt in enumerate(prompts):
            plan = next(plans, None)
            latents = self.renderer.render(prompt, plan.tokens if plan else None, overlap, seed, index, options).latents
            history = behind_overlap(overlap, latents)
            shown = history if index == 0 and given and given.shown else latents
            overlap = history[:, -keep:]
            yield self.decoder.decode(shown)
