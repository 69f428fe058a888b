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
from arlon_ray.models.ar import ArTransformer, Grid, KeyValueCache


@dataclass(frozen=True)
class SegmentTokens:
    """One segment's plan: tokens int32 [t', h', w'] of all its latents, those of the overlap included."""

    index: int
    tokens: np.ndarray


def draw(logits_K: Tensor, options: GenerationOptions, generator: torch.Generator) -> Tensor:
    """One token (int64 scalar) from logits [K] after temperature, top-k and top-p (nucleus)."""
    logits = logits_K.float() / options.temperature
    if 0 < options.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], -torch.inf)
    if options.top_p < 1.0:
        ordered, indices = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= options.top_p
        logits = logits.masked_fill(beyond.scatter(0, indices, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[0]


@torch.no_grad()
def sample_tokens(
    model: ArTransformer,
    text_1LE: Tensor,
    mask_1L: Tensor,
    context: Tensor,
    grid: Grid,
    options: GenerationOptions,
    generator: torch.Generator,
    on_token: Callable[[int], None] | None = None,
) -> Tensor:
    """Continue `context` (int64 [n], the first n places of `grid` in raster order) to the whole grid: int64 [t·h·w].

    With `ar_guidance_scale` ≠ 1 the text and the null text run as a batch of two through one cache.
    `on_token(n)` is called before every token and may raise, which stops the sampling there.
    """
    total, scale = grid[0] * grid[1] * grid[2], options.ar_guidance_scale
    text, mask = text_1LE, mask_1L
    if scale != 1.0:
        null, null_mask = model.without_text(text, mask, torch.ones(1, dtype=torch.bool, device=text.device))
        text, mask = torch.cat([text, null]), torch.cat([mask, null_mask])
    batch, length = mask.shape
    cache = KeyValueCache(model, batch, length + 1 + total)
    rotary = model.rotary(length, grid, length + 1 + total, text.device)
    places = model.places(grid)
    x, attention = model.embed(text, mask, context.expand(batch, -1), grid)
    visible = torch.nn.functional.pad(mask, (0, 1 + total), value=True)[:, None, None]
    tokens = list(context.unbind())
    while len(tokens) < total:
        if on_token is not None:
            on_token(len(tokens))
        start, end = cache.length, cache.length + x.shape[1]
        for layer, block in enumerate(model.blocks):
            x = block(x, rotary.part(start, end), attention, cache, layer)
        cache.length = end
        logits = model.head(model.norm(x[:, -1]))
        logits = logits[0] if scale == 1.0 else logits[1] + scale * (logits[0] - logits[1])
        tokens.append(draw(logits, options, generator))
        if len(tokens) < total:
            x = (model.codes(tokens[-1]) + places[len(tokens)]).expand(batch, 1, -1)
            attention = visible[..., : cache.length + 1]
    return torch.stack(tokens)


class ArPlanner:
    """Plans videos from prompts. Memory does not grow with the video: the context is a window of groups."""

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
        prompts: Sequence[str],
        seed: int,
        options: GenerationOptions,
        on_token: Callable[[int], None] | None = None,
        given: np.ndarray | None = None,
    ) -> Iterator[SegmentTokens]:
        """One plan a segment, in order; prompts[k] is the text of segment k. Equal arguments, equal tokens.

        `given` are latents float32 [C, n, h, w] that the first segment starts with (`Given`): the AR goes on from their
        tokens. Raises ValueError for latents that do not fit.
        """
        segment = self.config.segment
        per_group = self.group_grid[0]
        window = self._tokens_of(given)
        for index, prompt in enumerate(prompts):
            end = segment.groups * per_group
            if index:
                window = window[-self.config.ar.context_groups * per_group :]
                end = len(window) + (segment.groups - segment.overlap_groups) * per_group
            grid = (end, *self.group_grid[1:])
            embedding = self.text.encode([prompt])
            generator = segment_generator(seed, index, "ar", self.bundle.device)
            window = sample_tokens(
                self.model, *embedding, window.flatten(), grid, options, generator, on_token
            ).view(grid)  # fmt: skip
            yield SegmentTokens(index, window[-segment.groups * per_group :].int().cpu().numpy())

    def _tokens_of(self, given: np.ndarray | None) -> Tensor:
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
