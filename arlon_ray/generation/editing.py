"""Changing a video that is finished: one segment made anew between its neighbours.

More segments behind the last are `VideoGenerator.generate` with the project and more texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from arlon_ray.generation.generator import VideoGenerator
from arlon_ray.generation.options import segment_options
from arlon_ray.generation.overlapped import Threads, computing_with
from arlon_ray.generation.planning import ArPlanner
from arlon_ray.generation.project import EDITED, Project, ProjectSegment
from arlon_ray.generation.rendering import HandOver, behind_overlap
from arlon_ray.generation.storyboard import (
    SegmentText,
    begins_shot,
    first_of_prompt,
    first_of_shot,
    with_words,
)


class VideoEditor:
    """Edits a project with the bundle that made it. All other segments stay as they are, to the last bit."""

    def __init__(self, generator: VideoGenerator, project: Project) -> None:
        self.generator, self.project = generator, project
        self.segment = generator.bundle.config.segment
        #: Those that the video was made with: bits depend on how many there are.
        self._threads = Threads.shared(generator.bundle.device)

    def reroll(self, index: int, seed: int, text: SegmentText | None = None) -> None:
        """Make segment `index` anew with another seed, and another text if one is given.

        It begins behind the segment before, and ends before the first groups of the segment after, which are given to
        the DiT as those before are (`x_mask`): both joins hold, and a cut stays one. Raises ValueError for a segment
        that is not there.
        """
        if not 0 <= index < len(self.project):
            raise ValueError(f"segment {index}: the video has segments 0 to {len(self.project) - 1}")
        texts, after, tokens_after = self.project.texts(), None, None
        text = texts[index] if text is None else with_words(texts[index], text)
        if index + 1 < len(self.project) and not begins_shot(texts, index + 1):
            following = self.project.read(index + 1)
            keep = min(self.segment.overlap_latents, following.latents.shape[1])
            after = following.latents[:, :keep]
            if following.tokens is not None:
                per_latent = len(following.tokens) / self.segment.latents
                first = round(self.segment.overlap_latents * per_latent)
                tokens_after = following.tokens[first : first + round(keep * per_latent)]
        self._make([*texts[:index], text], seed, after, tokens_after)

    def _make(
        self,
        texts: Sequence[SegmentText],
        seed: int,
        after: np.ndarray | None = None,
        tokens_after: np.ndarray | None = None,
    ) -> None:
        """Make the segment of the last of `texts`, which are those of all segments up to it."""
        index, text = len(texts) - 1, texts[-1]
        tokens, planner, options = None, self.generator.planner, self.project.options
        if planner is not None and not options.baseline:
            tokens = self._planned(planner, texts, seed)
        guide = tokens if tokens is None or tokens_after is None else np.concatenate([tokens, tokens_after])
        overlap, its = self._taken_over(texts), segment_options(options, texts, index)
        with computing_with(self._threads.dit):
            made = self.generator.renderer.render(text, guide, overlap, seed, index, its, after=after)
        self.project.write(index, ProjectSegment(text, seed, made.latents, tokens, EDITED))

    def _planned(self, planner: ArPlanner, texts: Sequence[SegmentText], seed: int) -> np.ndarray:
        """The tokens [t', h', w'] of the segment of the last text."""
        index, seen = len(texts) - 1, planner.looked_at(texts, len(texts) - 1)
        if not index and (start := self.project.start):
            looked_at = planner.tokens_of(start.latents)
        else:
            looked_at = planner.joined([self._tokens(number) for number in seen], seen.start)
        first, begin = first_of_prompt(texts, index), None
        if first < index and planner.model.config.sink_groups:
            begin = planner.beginning(planner.device_tokens(self._tokens(first)), first)
        heard = [texts[number] for number in (*seen, index)]
        with computing_with(self._threads.ar):
            planned = planner.go_on(looked_at, heard, seed, index, self.project.options, begin=begin)
        before = planner.device_tokens(self._tokens(index - 1)) if index else None
        return planner.of_segment(planned, before, index).int().cpu().numpy()

    def _tokens(self, index: int) -> np.ndarray:
        found = self.project.read(index).tokens
        assert found is not None, "a guided project has tokens"
        return found

    def _taken_over(self, texts: Sequence[SegmentText]) -> np.ndarray | None:
        """What the segment of the last text takes over."""
        index = len(texts) - 1
        found, first = self._latents_before(texts, index), first_of_prompt(texts, index)
        if found is None or first == index:
            return found
        begun = self.project.read(first).latents
        if not first and self.project.start:
            begun = behind_overlap(self.project.start.latents, begun)
        return HandOver.of(self.generator.bundle.config, texts).anchored(found, begun)

    def _latents_before(self, texts: Sequence[SegmentText], index: int) -> np.ndarray | None:
        """The overlap that segment `index` takes over."""
        start, begin = self.project.start, first_of_shot(texts, index)
        found = start.latents if start and not begin else None
        # a segment may add fewer latents than the next one takes over
        first = max(begin, index - 1 - -(-self.segment.overlap_latents // max(1, self._new_latents)))
        for earlier in range(first, index):
            latents = self.project.read(earlier).latents
            found = latents if earlier == first and first else behind_overlap(found, latents)
        return found if found is None or not index else found[:, -self.segment.overlap_latents :]

    @property
    def _new_latents(self) -> int:
        return self.segment.latents - self.segment.overlap_latents
