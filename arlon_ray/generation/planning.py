"""The AR plans a video segment by segment: tokens of the fine codec, with the tokens of earlier segments as context.

Legend: t'×h'×w' token grid of a segment, N tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_LATENTS
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.seeds import segment_generator
from arlon_ray.generation.storyboard import SegmentText, prompts_in
from arlon_ray.models.ar import ArTransformer, Grid, KeyValueCache, frame_times


@dataclass(frozen=True)
class SegmentTokens:
    """One segment's plan: tokens int32 [t', h', w'] of all its latents, those of the overlap included."""

    index: int
    tokens: np.ndarray


@dataclass(frozen=True)
class Beginning:
    """The tokens int64 [n, h', w'] that a prompt began with, the first of them of group `group` of the video."""

    tokens: Tensor
    group: int


def draw(logits_K: Tensor, options: GenerationOptions, generator: torch.Generator) -> Tensor:
    """One token (int64 scalar) from logits [K] after temperature, top-k and top-p (nucleus).

    Sorts once and inverts the cumulative distribution at one random number; nothing waits for the device.
    """
    chances, order = (logits_K.float() / options.temperature).softmax(-1).sort(descending=True)
    if 0 < options.top_k < len(chances):
        chances = chances[: options.top_k]
    summed = chances.cumsum(-1)
    kept = summed - chances < options.top_p * summed[-1]  # the first codes, at least one
    point = torch.rand((), generator=generator, device=summed.device) * (chances * kept).sum()
    return order[(summed <= point).sum().clamp(max=len(chances) - 1)]


@torch.no_grad()
def sample_tokens(
    model: ArTransformer,
    text_1LE: Tensor,
    mask_1L: Tensor,
    context_thw: Tensor,
    grid: Grid,
    options: GenerationOptions,
    generator: torch.Generator,
    on_token: Callable[[int], None] | None = None,
    against: tuple[Tensor, Tensor] | None = None,
    times_t: Tensor | None = None,
) -> Tensor:
    """Continue `context` (int64 [t, h, w]: the first latent frames of `grid`, may be none) to the whole grid.

    Returns int64 [t, h, w]. `times_t` says when the grid's frames are, if not one after the other.
    With `ar_guidance_scale` ≠ 1 the text and what it is guided away from (`against`: another text and its mask; None:
    the null text) run as a batch of two through one cache. `on_token(n)` is called before every token and may raise,
    which stops the sampling there.
    """
    text, mask = text_1LE, mask_1L
    if options.ar_guidance_scale != 1.0:
        other = against or model.without_text(text, mask, torch.ones(1, dtype=torch.bool, device=text.device))
        text, mask = torch.cat([text, other[0]]), torch.cat([mask, other[1]])
    block_grid = model.block_grid(grid)
    total = block_grid[0] * block_grid[1] * block_grid[2]
    batch, length = mask.shape
    cache = KeyValueCache(model, batch, length + total)
    rotary = model.rotary(length, block_grid, length + total, text.device, times_t)
    places = model.places(block_grid, times_t)
    blocks = model.to_blocks(context_thw[None])
    x, attention = model.embed(text, mask, blocks.expand(batch, -1, -1), block_grid, times_t)
    visible = torch.nn.functional.pad(mask, (0, total), value=True)[:, None, None]
    inner = model.to_blocks(torch.zeros(1, *grid, dtype=torch.long, device=text.device))[0] <= model.last
    done, drawn = blocks.shape[1], [blocks[0]]
    count = context_thw.numel()
    while done < total:
        start, end = cache.length, cache.length + x.shape[1]
        for layer, block in enumerate(model.blocks):
            x = block(x, rotary.part(start, end), attention, cache, layer)
        cache.length = end
        tokens = _draw_block(model, x[:, -1:], inner[done], options, generator, on_token, count)
        count += int(inner[done].sum())
        drawn.append(tokens[None])
        done += 1
        if done < total:
            x = (model.embed_blocks(tokens[None, None]) + places[done]).expand(batch, 1, -1)
            attention = visible[..., : cache.length + 1]
    return model.from_blocks(torch.cat(drawn)[None], grid)[0]


def _draw_block(
    model: ArTransformer,
    x_B1C: Tensor,
    inner_k: Tensor,
    options: GenerationOptions,
    generator: torch.Generator,
    on_token: Callable[[int], None] | None,
    count: int,
) -> Tensor:
    """The tokens [k] of one block, one after the other; `inner` marks those on the grid, `count` came before."""
    scale, state = options.ar_guidance_scale, x_B1C[:, 0]
    tokens: list[Tensor] = []
    for place, on_grid in enumerate(inner_k.tolist()):
        if not on_grid:
            tokens.append(torch.tensor(model.codebook_size, device=x_B1C.device))
        else:
            if on_token is not None:
                on_token(count)
            feature = state if model.inside is None else model.inside.feature(state + model.inside.place[place])
            logits = model.head(model.norm(feature))
            logits = logits[0] if scale == 1.0 else logits[1] + scale * (logits[0] - logits[1])
            tokens.append(draw(logits, options, generator))
            count += 1
        if model.inside is not None and place + 1 < len(inner_k):
            state = state + model.inside.before[place](model.codes(tokens[-1].clamp(max=model.last)))
    return torch.stack(tokens)


class ArPlanner:
    """Plans videos from prompts, looking back as far as the AR was trained to: a window of groups, and the first ones.

    Memory does not grow with the video.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.text, self.model, self.codec = bundle.text, bundle.ar, bundle.codec
        height, width = bundle.config.latent_grid
        self.group_grid = self.codec.grid(GROUP_LATENTS, height, width)

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | torch.device = "cpu") -> ArPlanner:
        """Open a bundle and load what planning needs."""
        return cls(load_bundle(path, device))

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
        window, begin = self.tokens_of(given), None
        if planned:
            self._check(planned, len(prompts))
            window, begin = self._behind(prompts, planned)
        for index in range(len(planned), len(prompts)):
            texts = [prompts[i] for i in (*self.looked_at(index), index)]
            begin = begin if index and prompts[index - 1] == prompts[index] else None
            window = self.go_on(window, texts, seed, index, options, on_token, begin)
            begin = begin or self.beginning(window[-self.segment_frames :], index)
            yield SegmentTokens(index, window[-self.segment_frames :].int().cpu().numpy())

    def _check(self, planned: Sequence[np.ndarray], segments: int) -> None:
        expected = (self.segment_frames, *self.group_grid[1:])
        if len(planned) > segments:
            raise ValueError(
                f"tokens of {len(planned)} segments for a video of {segments}: expected at most {segments}"
            )
        for index, tokens in enumerate(planned):
            if tokens.shape != expected:
                raise ValueError(f"tokens of shape {list(tokens.shape)} of segment {index}: expected {list(expected)}")

    def _behind(self, prompts: Sequence[SegmentText], planned: Sequence[np.ndarray]) -> tuple[Tensor, Beginning]:
        """What the AR looks at behind the planned segments, and what the prompt of the last of them began with."""
        seen = self.looked_at(len(planned))
        first = len(planned) - 1
        while first and prompts[first - 1] == prompts[first]:
            first -= 1
        began = torch.from_numpy(np.array(planned[first])).long().to(self.bundle.device)
        return self.joined([planned[index] for index in seen], seen.start), self.beginning(began, first)

    def joined(self, segments: Sequence[np.ndarray], first: int) -> Tensor:
        """Tokens int64 [n, h', w'] of the segments from `first` on (each [t', h', w']), what they share only once."""
        parts = [tokens[self.overlap_frames(index) :] for index, tokens in enumerate(segments, start=first)]
        return torch.from_numpy(np.concatenate(parts)).long().to(self.bundle.device)

    @property
    def segment_frames(self) -> int:
        """Token frames of a segment."""
        return self.config.segment.groups * self.group_grid[0]

    def looked_at(self, index: int) -> range:
        """The earlier segments whose tokens segment `index` is planned right behind."""
        segment = self.config.segment
        count = -(-self.model.config.context_groups // (segment.groups - segment.overlap_groups))
        return range(max(0, index - count), index)

    def beginning(self, tokens: Tensor, index: int) -> Beginning:
        """Of the tokens [t', h', w'] of segment `index`, the first of its prompt, what the AR never loses sight of."""
        group = self.config.segment.groups_of(index) if index else 0
        return Beginning(
            tokens[self.overlap_frames(index) :][: self.model.config.sink_groups * self.group_grid[0]], group
        )

    def overlap_frames(self, index: int) -> int:
        """Token frames of segment `index` that are those of the segment before: what follows them is new."""
        return self.config.segment.overlap_groups * self.group_grid[0] if index else 0

    @torch.no_grad()
    def go_on(
        self,
        before: Tensor,
        texts: Sequence[SegmentText],
        seed: int,
        index: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        begin: Beginning | None = None,
    ) -> Tensor:
        """Plan segment `index` behind tokens int64 [n, h', w'], of which the newest are looked at: those, and its own.

        The first segment goes on from what it is given; a later one from all that was planned before it, and from
        `begin`, what its prompt began with, where it looks back no further than behind that. `texts` are those of the
        segments that it looks at (`looked_at`) and, last, its own. Where it looks at what was planned by another
        prompt, it is guided away from that one instead of from no text: what is in sight would go on as it did.
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
        for prompt, until in self._parts(texts[-1], end, len(window)):
            grid = (until, *self.group_grid[1:])
            others = [other for other in heard if other != prompt]
            against = self.text.encode(others[-1:]) if others and options.ar_contrast else None
            window = sample_tokens(
                self.model, *self.text.encode([prompt]), window, grid, options, generator, on_token, against,
                times[:until],
            )  # fmt: skip
            heard.append(prompt)
        return window[sink:]

    def _parts(self, text: SegmentText, end: int, known: int) -> Iterator[tuple[str, int]]:
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
