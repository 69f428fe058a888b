"""Changing a video that is finished: one segment made anew between its neighbours, more segments behind the last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from arlon_ray.generation.generator import VideoGenerator
from arlon_ray.generation.options import segment_options
from arlon_ray.generation.overlapped import Threads, computing_with
from arlon_ray.generation.planning import Beginning
from arlon_ray.generation.project import Project, ProjectSegment
from arlon_ray.generation.rendering import HandOver, behind_overlap
from arlon_ray.generation.storyboard import SegmentText


class VideoEditor:
    """Edits a project with the bundle that made it. All other segments stay as they are, to the last bit."""

    def __init__(self, generator: VideoGenerator, project: Project) -> None:
        self.generator, self.project = generator, project
        self.segment = generator.bundle.config.segment
        self._hand_over = HandOver.of(generator.bundle.config)
        #: Those that the video was made with: bits depend on how many there are.
        self._threads = Threads.shared(generator.bundle.device)

    def reroll(self, index: int, seed: int, text: SegmentText | None = None) -> None:
        """Make segment `index` anew with another seed, and another text if one is given.

        It begins behind the segment before, and ends before the first groups of the segment after, which are given to
        the DiT as those before are (`x_mask`): both joins hold. Raises ValueError for a segment that there is not.
        """
        if not 0 <= index < len(self.project):
            raise ValueError(f"segment {index}: the video has segments 0 to {len(self.project) - 1}")
        text = self.project.read(index).text if text is None else text
        after, tokens_after = None, None
        if index + 1 < len(self.project):
            following = self.project.read(index + 1)
            keep = min(self.segment.overlap_latents, following.latents.shape[1])
            after = following.latents[:, :keep]
            if following.tokens is not None:
                per_latent = len(following.tokens) / self.segment.latents
                first = round(self.segment.overlap_latents * per_latent)
                tokens_after = following.tokens[first : first + round(keep * per_latent)]
        self._make(index, seed, text, after, tokens_after)

    def extend(self, texts: Sequence[SegmentText], seed: int) -> Iterator[int]:
        """Add a segment for each text; yields the number of each when it is there."""
        for text in texts:
            index = len(self.project)
            self._make(index, seed, text)
            yield index

    def frames(self) -> Iterator[np.ndarray]:
        """The video, segment by segment: uint8 [T, H, W, 3]."""
        start, last = self.project.start, None
        for index, segment in enumerate(self.project):
            latents = segment.latents
            if index == 0 and start is not None and start.shown:
                latents = behind_overlap(start.latents, latents)
            with computing_with(self._threads.decoder):
                frames = self.generator.decoder.decode(latents, last, self.project.options.seam_frames)
            last = frames[-1].copy()
            yield frames

    def _make(
        self,
        index: int,
        seed: int,
        text: SegmentText,
        after: np.ndarray | None = None,
        tokens_after: np.ndarray | None = None,
    ) -> None:
        tokens, planner, options = None, self.generator.planner, self.project.options
        first = self._first_of_prompt(index, text)
        if planner is not None and not options.baseline:
            earlier = [self.project.read(number) for number in planner.looked_at(index)]
            texts = [*(segment.text for segment in earlier), text]
            before, begin = self._tokens_of(earlier, index), self._beginning(first, index)
            with computing_with(self._threads.ar):
                planned = planner.go_on(before, texts, seed, index, options, begin=begin)
            tokens = planned[-planner.segment_frames :].int().cpu().numpy()
        guide = tokens if tokens is None or tokens_after is None else np.concatenate([tokens, tokens_after])
        overlap = self._taken_over(first, index)
        texts = [*([self.project.read(index - 1).text] if index else []), text]
        its = segment_options(options, texts, len(texts) - 1)
        with computing_with(self._threads.dit):
            made = self.generator.renderer.render(text, guide, overlap, seed, index, its, after=after)
        self.project.write(index, ProjectSegment(text, seed, made.latents, tokens))

    def _tokens_of(self, earlier: Sequence[ProjectSegment], index: int) -> torch.Tensor:
        """What the AR plans segment `index` behind: the tokens of the segments that it looks at, or of the start."""
        planner, start = self.generator.planner, self.project.start
        assert planner is not None
        if not earlier:
            return planner.tokens_of(start.latents if start else None)
        known = [segment.tokens for segment in earlier if segment.tokens is not None]
        assert len(known) == len(earlier), "a guided project has tokens"
        return planner.joined(known, index - len(earlier))

    def _beginning(self, first: int, index: int) -> Beginning | None:
        """What the prompt of segment `index` began with, if that was before it and the AR does not lose sight of it."""
        planner = self.generator.planner
        if planner is None or not planner.model.config.sink_groups or first == index:
            return None
        found = self.project.read(first)
        assert found.tokens is not None, "a guided project has tokens"
        return planner.beginning(torch.from_numpy(found.tokens).long().to(self.generator.bundle.device), first)

    def _taken_over(self, first: int, index: int) -> np.ndarray | None:
        """What segment `index`, whose prompt began with segment `first`, takes over."""
        found = self._latents_before(index)
        if found is None or first == index or not self._hand_over.anchor:
            return found
        begun = self._hand_over.after(self._latents_before(first), self.project.read(first).latents, first)
        return np.concatenate([begun[:, : self._hand_over.anchor], found], axis=1)

    def _first_of_prompt(self, index: int, text: SegmentText) -> int:
        """The segment that the prompt of segment `index`, which is `text`, began with; where neither AR nor DiT looks
        back on that, segment `index`.
        """
        planner, first = self.generator.planner, index
        looked_back_on = self._hand_over.anchor or (planner is not None and planner.model.config.sink_groups)
        while looked_back_on and first and self.project.read(first - 1).text == text:
            first -= 1
        return first

    def _latents_before(self, index: int) -> np.ndarray | None:
        """The overlap that segment `index` takes over."""
        start = self.project.start
        found = start.latents if start else None
        # a segment may add fewer latents than the next one takes over
        first = max(0, index - 1 - -(-self.segment.overlap_latents // max(1, self._new_latents)))
        for earlier in range(first, index):
            latents = self.project.read(earlier).latents
            found = latents if earlier == first and first else behind_overlap(found, latents)
        return found if found is None or not index else found[:, -self.segment.overlap_latents :]

    @property
    def _new_latents(self) -> int:
        return self.segment.latents - self.segment.overlap_latents
