"""A long video in one process: plan, render, decode, segment by segment, on a constant budget of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation.decoding import FrameDecoder
from arlon_ray.generation.given import Given
from arlon_ray.generation.options import GenerationOptions, default_options, segment_options
from arlon_ray.generation.overlapped import Threads, Timeline, computing_with, in_background
from arlon_ray.generation.planning import ArPlanner, SegmentTokens
from arlon_ray.generation.project import UNTIL, Project, ProjectSegment
from arlon_ray.generation.rendering import DiTRenderer, HandOver, behind_overlap
from arlon_ray.generation.storyboard import SegmentText, begins_shot


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
        prompts: Sequence[SegmentText],
        seed: int = 0,
        options: GenerationOptions | None = None,
        given: Given | None = None,
        timeline: Timeline | None = None,
        project: Project | None = None,
        until: Given | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames uint8 [T, H, W, 3] of one segment after the other; prompts[k] is the text of segment k
        (`storyboard` makes them of prompts with durations).

        The AR plans the next segment while the DiT renders one and the one before is decoded, each in a thread of its
        own, at most one segment ahead. `given` is what the first segment starts from (`given_picture`, `given_clip`),
        `until` what the last one leads up to (the beginning of a clip, by `given_clip`); it is not part of the frames.
        A text-only bundle renders the baseline whatever the options say. `timeline` notes who worked when.

        `project` keeps what each segment was made of. Segments that it has already are decoded, not made again,
        whatever prompts and seed say (`Project.begins` tells whether they are these), and what follows is, to the last
        bit, what it would have been in one go: a video that was interrupted goes on, one that is finished becomes
        longer.
        """
        options = options or default_options(self.bundle.config.sampling)
        timeline = timeline or Timeline()
        if self.planner is None:
            options = options.model_copy(update={"baseline": True})
        threads = Threads.shared(self.bundle.device)
        rendered = self._rendered(prompts, seed, options, given, timeline, project, until, threads)
        latents = in_background(rendered, 1, threads.dit)
        last: np.ndarray | None = None
        with closing(latents):  # type: ignore[type-var]
            for index, shown in enumerate(latents):
                before = None if begins_shot(prompts, index) else last
                decode = partial(self.decoder.decode, shown, before, options.seam_frames)
                with computing_with(threads.decoder):
                    frames = timeline.timed("decoder", index, decode)
                last = frames[-1].copy()
                yield frames

    def _rendered(
        self,
        prompts: Sequence[SegmentText],
        seed: int,
        options: GenerationOptions,
        given: Given | None,
        timeline: Timeline,
        project: Project | None,
        until: Given | None,
        threads: Threads,
    ) -> Iterator[np.ndarray]:
        """The latents [C, n, h, w] to show of each segment."""
        hand_over = HandOver.of(self.bundle.config, prompts)
        handed = given.latents if given else None
        kept = min(len(project), len(prompts)) if project is not None else 0
        plans: Iterator[SegmentTokens] = iter(())
        if self.planner is not None and not options.baseline and kept < len(prompts):
            known = project.tokens(kept) if project is not None else []
            planned = _timed(self.planner.plan(prompts, seed, options, given=handed, planned=known), timeline, kept)
            plans = in_background(planned, 1, threads.ar)
        try:
            for index, prompt in enumerate(prompts):
                taken = hand_over.taken(handed, index)
                if project is not None and index < kept:
                    latents = project.read(index).latents
                else:
                    plan = next(plans, None)
                    tokens = plan.tokens if plan else None
                    after = until.latents if until and index == len(prompts) - 1 else None
                    guide = tokens if tokens is None or after is None else self._led_up(tokens, after)
                    its = segment_options(options, prompts, index)
                    render = partial(self.renderer.render, prompt, guide, taken, seed, index, its, after=after)
                    latents = timeline.timed("dit", index, render).latents
                    if project is not None:
                        mark = UNTIL if after is not None else ""
                        project.write(index, ProjectSegment(prompt, seed, latents, tokens, mark))
                handed = hand_over.after(taken, latents, index)
                yield behind_overlap(taken, latents) if index == 0 and given and given.shown else latents
        finally:
            if (close := getattr(plans, "close", None)) is not None:
                close()

    def _led_up(self, tokens: np.ndarray, after: np.ndarray) -> np.ndarray:
        """A segment's tokens and those of the latents behind it."""
        assert self.planner is not None
        return np.concatenate([tokens, self.planner.tokens_of(after).int().cpu().numpy()])


def _timed(plans: Iterator[SegmentTokens], timeline: Timeline, first: int) -> Iterator[SegmentTokens]:
    for index in count(first):
        plan = timeline.timed("ar", index, lambda: next(plans, None))
        if plan is None:
            timeline.spans.pop()
            return
        yield plan
