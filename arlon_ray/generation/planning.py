"""The AR plans a video segment by segment: tokens of the fine codec, with the tokens of earlier segments as context.

Legend: t'×h'×w' token grid of a segment, N tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from arlon_ray.bundle import Bundle
from arlon_ray.config import GROUP_LATENTS
from arlon_ray.generation.batching import run_alone
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.generation.seeds import segment_generator
from arlon_ray.generation.storyboard import (
    SegmentText,
    Words,
    begins_shot,
    first_of_prompt,
    first_of_shot,
    goes_on,
    prompts_in,
    words_of,
)
from arlon_ray.models.ar import frame_times

T = TypeVar("T")


@dataclass(frozen=True)
class SegmentTokens:
    """One segment's plan: tokens int32 [t', h', w'] of all its latents, those of the overlap included.

    Behind a cut these are still those of the segment before, which it does not take over.
    """

    index: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Beginning:
    """The tokens int64 [n, h', w'] that a prompt began with, the first of them of group `group` of the video."""

    tokens: Tensor
    group: int


class ArPlanner:
    """Plans videos from prompts, looking back as far as the AR was trained to: a window of groups, and the first ones.

    Memory does not grow with the video.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.text, self.model, self.codec = bundle.text, bundle.ar, bundle.codec
        height, width = bundle.config.latent_grid
        self.group_grid = self.codec.grid(GROUP_LATENTS, height, width)
        self._unused: list[SamplingBatch] = []

    def plan(
        self,
        prompts: Sequence[SegmentText],
        seed: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        given: np.ndarray | None = None,
        planned: Sequence[np.ndarray] = (),
    ) -> Iterator[SegmentTokens]:
        """One plan a segment, in order; prompts[k] is the text of segment k. Equal arguments, equal tokens.

        Where the text changes within a segment, each token is planned with the prompt that counts most in its frames.

        `given` are latents float32 [C, n, h, w] that the first segment starts with (`Given`): the AR goes on from their
        tokens. `planned` are the tokens int32 [t', h', w'] of the first segments, where those are there already: only
        what follows is planned, as if all had been planned in one go. Raises ValueError for tokens that do not fit.
        """
        plan = self.begin(prompts, seed, options, on_token, given, planned)
        for _ in range(len(planned), len(prompts)):
            yield self._alone(plan.segment())

    def begin(
        self,
        prompts: Sequence[SegmentText],
        seed: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        given: np.ndarray | None = None,
        planned: Sequence[np.ndarray] = (),
    ) -> Plan:
        """`plan` for a batch. In each batch its segments become what they are alone (`SamplingBatch`)."""
        return Plan(self, prompts, seed, options, on_token, given, planned)

    def batch(self, most: int = 1) -> SamplingBatch:
        """What plans of at most so many videos share. Its memory is taken at once, if it is held while it is idle."""
        t, h, w = self.model.block_grid((self.config.ar_window_groups * self.group_grid[0], *self.group_grid[1:]))
        positions = self.config.text.max_tokens + t * h * w
        return SamplingBatch(self.model, positions, most, held=not self.bundle.offloads_idle)

    def _alone(self, request: Generator[Sampling, Any, T]) -> T:
        """`run_alone` in a batch that is kept for the next time: weights laid out, graphs captured."""
        try:
            batch = self._unused.pop()  # in one go, for another thread may plan as well
        except IndexError:
            batch = self.batch()
        try:
            return run_alone(batch, request)
        finally:
            if not batch.members:
                self._unused.append(batch)

    def check(self, planned: Sequence[np.ndarray], segments: int) -> None:
        """Raises ValueError for tokens that are not those of the first of so many segments."""
        expected = (self.segment_frames, *self.group_grid[1:])
        if len(planned) > segments:
            raise ValueError(
                f"tokens of {len(planned)} segments for a video of {segments}: expected at most {segments}"
            )
        for index, tokens in enumerate(planned):
            if tokens.shape != expected:
                raise ValueError(f"tokens of shape {list(tokens.shape)} of segment {index}: expected {list(expected)}")

    def behind(self, prompts: Sequence[SegmentText], planned: Sequence[np.ndarray]) -> tuple[Tensor, Beginning]:
        """What the AR looks at behind the planned segments, and what the prompt of the last of them began with."""
        seen = self.looked_at(prompts, len(planned))
        first = first_of_prompt(prompts, len(planned) - 1)
        began = self.device_tokens(planned[first])
        return self.joined([planned[index] for index in seen], seen.start), self.beginning(began, first)

    def joined(self, segments: Sequence[np.ndarray], first: int) -> Tensor:
        """Tokens int64 [n, h', w'] of the segments from `first` on (each [t', h', w']), what they share only once."""
        if not segments:
            return self.tokens_of(None)
        parts = [tokens[self.overlap_frames(index) :] for index, tokens in enumerate(segments, start=first)]
        return self.device_tokens(np.concatenate(parts))

    def device_tokens(self, tokens: np.ndarray) -> Tensor:
        """Tokens as int64 where the bundle is."""
        return torch.from_numpy(np.array(tokens)).long().to(self.bundle.device)

    @property
    def segment_frames(self) -> int:
        """Token frames of a segment."""
        return self.config.segment.groups * self.group_grid[0]

    def looked_at(self, texts: Sequence[SegmentText], index: int) -> range:
        """The earlier segments of its shot whose tokens segment `index` is planned right behind."""
        segment = self.config.segment
        count = -(-self.model.config.context_groups // (segment.groups - segment.overlap_groups))
        return range(max(first_of_shot(texts, index), index - count), index)

    def beginning(self, tokens: Tensor, index: int) -> Beginning:
        """Of the tokens [t', h', w'] of segment `index`, the first of its prompt, what the AR never loses sight of."""
        group = self.config.segment.groups_of(index) if index else 0
        return Beginning(
            tokens[self.overlap_frames(index) :][: self.model.config.sink_groups * self.group_grid[0]], group
        )

    def of_segment(self, planned: Tensor, before: Tensor | None, index: int) -> Tensor:
        """Tokens int64 [t', h', w'] of segment `index`: the last planned ones, behind those of segment `index` - 1."""
        shared = self.overlap_frames(index)
        new = planned[-(self.segment_frames - shared) :]
        return new if before is None or not shared else torch.cat([before[-shared:], new])

    def overlap_frames(self, index: int) -> int:
        """Token frames of segment `index` that are those of the segment before: what follows them is new."""
        return self.config.segment.overlap_groups * self.group_grid[0] if index else 0

    def go_on(
        self,
        before: Tensor,
        texts: Sequence[SegmentText],
        seed: int,
        index: int,
        options: GenerationOptions,
        begin: Beginning | None = None,
    ) -> Tensor:
        """`going_on` alone."""
        return self._alone(self.going_on(before, texts, seed, index, options, begin=begin))

    @torch.no_grad()
    def going_on(
        self,
        before: Tensor,
        texts: Sequence[SegmentText],
        seed: int,
        index: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        begin: Beginning | None = None,
    ) -> Generator[Sampling, Tensor, Tensor]:
        """Plan segment `index` behind tokens int64 [n, h', w'], of which the newest are looked at: those, and its own.

        The first segment goes on from what it is given; a later one from all that its shot has planned, and from
        `begin`, what its prompt began with, where it looks back no further than behind that. `texts` are those of the
        segments that it looks at (`looked_at`) and, last, its own. Where it looks at what was planned by another
        prompt, it is guided away from that one instead of from no text: what is in sight would go on as it did.
        Elsewhere it is guided away from the negative prompt, if there is one.
        """
        per_group, segment, context = self.group_grid[0], self.config.segment, self.model.config.context_groups
        window, end, sink, gap = before, self.segment_frames, 0, 0
        if index:
            window = before[-context * per_group :]
            end = len(window) + (segment.groups - segment.overlap_groups) * per_group
        if begin is not None:
            passed = (segment.groups_of(index) - context - begin.group) * per_group  # frames out of sight
            if sink := max(0, min(len(begin.tokens), passed)):
                window, end, gap = torch.cat([begin.tokens[:sink], window]), end + sink, min(passed - sink, per_group)
        times = frame_times(end, sink, gap)
        generator = segment_generator(seed, index, "ar", self.bundle.device)
        heard = [prompt for earlier in texts[:-1] for prompt in prompts_in(earlier)]
        for prompt, until in self._parts(words_of(texts[-1]), end, len(window)):
            grid = (until, *self.group_grid[1:])
            others = [other for other in heard if other != prompt] if options.ar_contrast else []
            away = (others or [options.negative_prompt])[-1]
            against = self.text.encode([away]) if away else None
            text = self.text.encode([prompt])
            with self.bundle.at_work(self.model):
                window = yield Sampling(text, window, grid, options, generator, on_token, against, times[:until])
            heard.append(prompt)
        return window[sink:]

    def _parts(self, text: Words, end: int, known: int) -> Iterator[tuple[str, int]]:
        """(prompt, token frame before which it ends) of what is to be planned from frame `known` to `end`."""
        if isinstance(text, str):
            yield text, end
            return
        per_token = GROUP_LATENTS // self.group_grid[0]
        until = known
        for prompt, latents in text.spans(self.config.segment.latents - (end - known) * per_token, per_token):
            until += latents // per_token
            yield prompt, until

    def tokens_of(self, given: np.ndarray | None) -> Tensor:
        """Tokens [t', h', w'] of the given latents, as far as they fill whole tokens.

        A codec that codes each latent frame on its own has tokens of a single picture; one that codes a group at once
        has none of it.
        """
        if given is None:
            return torch.zeros(0, *self.group_grid[1:], dtype=torch.long, device=self.bundle.device)
        latents = torch.from_numpy(given)[None].to(self.bundle.device)
        missing = -latents.shape[2] % GROUP_LATENTS
        whole = torch.cat([latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        per_token = GROUP_LATENTS // self.group_grid[0]
        if latents.shape[2] < per_token:
            getLogger(__name__).warning(
                "the codec makes one token of %d latent frames, the video starts from %d: the AR plans without it",
                per_token, latents.shape[2],
            )  # fmt: skip
        return self.codec.encode(whole)[0, : latents.shape[2] // per_token]


class Plan:
    """One video's plan, as far as it is: each segment is a request for a batch.

    Arguments, and what is raised for those that do not fit: `ArPlanner.plan`.
    """

    def __init__(
        self,
        planner: ArPlanner,
        prompts: Sequence[SegmentText],
        seed: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        given: np.ndarray | None = None,
        planned: Sequence[np.ndarray] = (),
    ) -> None:
        planner.check(planned, len(prompts))
        self.index = len(planned)
        self._planner, self._prompts, self._seed, self._options = planner, prompts, seed, options
        self._on_token, self._given, self._planned = on_token, given, planned
        self._window: Tensor | None = None
        self._begin: Beginning | None = None
        #: Of the segment before.
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def segment(self) -> Generator[Sampling, Tensor, SegmentTokens]:
        """The next segment, once the one before is there."""
        planner, prompts, index = self._planner, self._prompts, self.index
        window = self._look_back() if self._window is None else self._window
        if index and begins_shot(prompts, index):
            window = planner.tokens_of(None)
        texts = [prompts[i] for i in (*planner.looked_at(prompts, index), index)]
        begin = self._begin if goes_on(prompts, index) else None
        window = yield from planner.going_on(window, texts, self._seed, index, self._options, self._on_token, begin)
        tokens = planner.of_segment(window, self._tokens, index)
        self._window, self._tokens, self.index = window, tokens, index + 1
        self._begin = begin or planner.beginning(tokens, index)
        return SegmentTokens(index, tokens.int().cpu().numpy())

    def _look_back(self) -> Tensor:
        """What there is before the first segment that is planned."""
        if not self._planned:
            return self._planner.tokens_of(self._given)
        window, self._begin = self._planner.behind(self._prompts, self._planned)
        self._tokens = self._planner.device_tokens(self._planned[-1])
        self._planned = ()
        return window
