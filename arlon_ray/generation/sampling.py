"""Tokens drawn from the AR: of one request, or of many that share its steps, each at its own place.

A step is one block of tokens for every member. Rows of the batch are what the transformer runs on: a member has one,
or two that are guided apart (its text, and what it leads away from). On a CPU a row's bits do not depend on the rows
beside it, if there are never fewer than `UNIT` and always whole units (fewer rows take other kernels): so a member
draws the same tokens in every batch, alone too. On a GPU the kernels are chosen by the number of rows, and tokens may
differ where two were all but equally likely.

Legend: R rows, Q members, P positions, C channels, D channels a head, K codes, k tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.generation.batching import Member
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.ar import ArTransformer, Grid, KeyValueCache, Rotary

#: Rows come in multiples of this.
UNIT = 4


class Choice(NamedTuple):
    """How each of Q members draws: all [Q]."""

    temperature: Tensor
    top_k: Tensor  # 0: all codes
    top_p: Tensor

    @classmethod
    def of(cls, options: list[GenerationOptions], device: torch.device) -> Choice:
        """Of the members' options."""
        return cls(
            torch.tensor([o.temperature for o in options], device=device),
            torch.tensor([o.top_k for o in options], device=device),
            torch.tensor([o.top_p for o in options], device=device),
        )


def draw(logits_QK: Tensor, choice: Choice, numbers_Q: Tensor) -> Tensor:
    """A token for each member (int64 [Q]) after temperature, top-k and top-p (nucleus).

    Sorts once and inverts the cumulative distribution at the random numbers in [0, 1); nothing waits for the device.
    """
    chances, order = (logits_QK.float() / choice.temperature[:, None]).softmax(-1).sort(descending=True)
    codes = chances.shape[-1]
    most = torch.where(choice.top_k > 0, choice.top_k.clamp(max=codes), codes)
    chances = chances * (torch.arange(codes, device=chances.device) < most[:, None])
    summed = chances.cumsum(-1)
    # the first codes, at least one
    kept = (summed - chances < choice.top_p[:, None] * summed[:, -1:]) & (chances > 0)
    point = numbers_Q * (chances * kept).sum(-1)
    place = torch.minimum((summed <= point[:, None]).sum(-1), most - 1)
    return order.gather(1, place[:, None])[:, 0]


class Sampling(Member[Tensor]):
    """One request: `context` (int64 [t, h, w]: the first latent frames of `grid`, may be none) goes on to the grid.

    Its result is int64 [t, h, w]. `times_t` says when the grid's frames are, if not one after the other. With
    `ar_guidance_scale` ≠ 1 it is guided away from `against` (another text and its mask; None: the null text).
    `on_token(n)` is called before every token and may raise, which ends it there.
    """

    def __init__(
        self,
        text: tuple[Tensor, Tensor],
        context_thw: Tensor,
        grid: Grid,
        options: GenerationOptions,
        generator: torch.Generator,
        on_token: Callable[[int], None] | None = None,
        against: tuple[Tensor, Tensor] | None = None,
        times_t: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.text, self.context, self.grid, self.options = text, context_thw, grid, options
        self.generator, self.on_token, self.against, self.times = generator, on_token, against, times_t
        self.rows = 1 if options.ar_guidance_scale == 1.0 else 2
        self.blocks: list[Tensor] = []
        self.count, self.total = context_thw.numel(), 0
        self.inner: list[list[bool]] = []

    def may_draw(self) -> bool:
        """Whether it goes on with its next token: it may be stopped."""
        if self.error is None and self.on_token is not None:
            try:
                self.on_token(self.count)
            except Exception as error:
                self.error = error
        return self.error is None


class _Layout(NamedTuple):
    """Whose rows are whose, and how members draw: changes when one joins or leaves."""

    owners_R: Tensor  # those that fill up the last unit are counted as the first member's
    first_Q: Tensor  # each member's row with its text,
    away_Q: Tensor  # and the one that it is guided away from (the same, where it is not guided)
    scale_Q1: Tensor
    choice: Choice

    @classmethod
    def of(cls, members: list[Sampling], device: torch.device) -> _Layout:
        """Of these members, in their order."""
        owners = [number for number, member in enumerate(members) for _ in range(member.rows)]
        away = torch.tensor([member.rows for member in members], device=device).cumsum(0) - 1
        options = [member.options for member in members]
        return cls(
            torch.tensor(owners + [0] * (_whole(len(owners)) - len(owners)), device=device),
            torch.cat([away.new_zeros(1), away[:-1] + 1]),
            away,
            torch.tensor([each.ar_guidance_scale for each in options], device=device)[:, None],
            Choice.of(options, device),
        )


class SamplingBatch:
    """A `Batch` of samplings on one cache: `most` members, each of at most `positions` (text, start and blocks).

    Members' rows lie one behind the other; where one leaves, those behind it move up.
    """

    def __init__(self, model: ArTransformer, positions: int, most: int = 1) -> None:
        self.model, self.most, self.positions = model, most, positions
        rows = _whole(2 * most)
        self.cache = KeyValueCache(model, rows, positions)
        weight = model.head.weight
        dim, device = model.config.dim, weight.device
        self.members: list[Sampling] = []
        self._layout: _Layout | None = None
        # what each row has at each position: rotations (of queries, of keys), place embeddings, whether it is seen
        self._turns = torch.zeros(rows, positions, 4, dim // model.config.heads, device=device)
        self._places = torch.zeros(rows, positions, dim, device=device, dtype=weight.dtype)
        self._visible = torch.zeros(rows, positions, dtype=torch.bool, device=device)
        # how many positions are filled, and the transformer's output at the last of them
        self._filled = torch.zeros(rows, dtype=torch.long, device=device)
        self._state = torch.zeros(rows, dim, device=device, dtype=weight.dtype)

    @property
    def rows(self) -> int:
        """Rows that members have."""
        return sum(member.rows for member in self.members)

    def has_room(self) -> bool:
        """See Batch."""
        return len(self.members) < self.most

    @torch.no_grad()
    def join(self, member: Sampling) -> None:
        """See Batch. Runs the text and the context, by themselves."""
        model = self.model
        text, mask = member.text
        if member.rows > 1:
            other = member.against or model.without_text(text, mask, torch.ones_like(mask[:, 0]))
            text, mask = torch.cat([text, other[0]]), torch.cat([mask, other[1]])
        grid, length = model.block_grid(member.grid), mask.shape[1]
        member.total = grid[0] * grid[1] * grid[2]
        blocks = model.to_blocks(member.context[None])
        if length + member.total > self.positions:
            raise ValueError(f"{length} text tokens and {member.total} blocks: expected {self.positions} at most")
        if blocks.shape[1] == member.total:
            member.end(member.context)
            return
        x, attention = model.embed(text, mask, blocks.expand(len(text), -1, -1), grid, member.times)
        filled = x.shape[1]
        rotary = model.rotary(length, grid, length + member.total, x.device, member.times)
        rows = slice(self.rows, self.rows + member.rows)
        for layer, block in enumerate(model.blocks):
            x = block(x, rotary.part(0, filled), attention, partial(self.cache.begin, layer, rows))
        self._turns[rows, : length + member.total] = torch.stack([*rotary.query, *rotary.key], 1)
        self._places[rows, length : length + member.total] = model.places(grid, member.times)
        self._visible[rows] = F.pad(mask, (0, self.positions - length), value=True)
        self._filled[rows], self._state[rows] = filled, x[:, -1]
        off_grid = model.to_blocks(torch.zeros(1, *member.grid, dtype=torch.long))[0] > model.last
        member.inner = (~off_grid).tolist()
        member.blocks = list(blocks[0])
        self.members.append(member)
        self._layout = None

    def leave(self, member: Sampling) -> None:
        """See Batch."""
        first = sum(other.rows for other in self.members[: self.members.index(member)])
        kept, count = slice(first + member.rows, self.rows), self.rows - first - member.rows
        for tensor in (self._turns, self._places, self._visible, self._filled, self._state, self.cache.by_row):
            tensor[first : first + count] = tensor[kept].clone()
        self.members.remove(member)
        self._layout = None

    @torch.no_grad()
    def step(self) -> list[Sampling]:
        """See Batch: a block for each member, then the transformer on those that have more to come."""
        if not self.members:
            return []
        blocks, fine = self._draw()
        for member, block, finite in zip(self.members, blocks, fine.tolist(), strict=True):
            if member.error is None and not finite:
                member.error = FloatingPointError("what the AR predicts is not finite numbers")
            member.blocks.append(block)
            if member.error is None and len(member.blocks) == member.total:
                member.end(self.model.from_blocks(torch.stack(member.blocks)[None], member.grid)[0])
        ended = [member for member in self.members if member.ended]
        for member in ended:
            self.leave(member)
        if self.members:
            self._advance()
        return ended

    def _now(self) -> _Layout:
        if self._layout is None:
            self._layout = _Layout.of(self.members, self._state.device)
            self._filled[self.rows :] = 0
        return self._layout

    def _advance(self) -> None:
        """Feed each member's newest block through the transformer."""
        model, owners = self.model, self._now().owners_R
        rows, filled = torch.arange(len(owners), device=owners.device), self._filled[: len(owners)]
        newest = torch.stack([member.blocks[-1] for member in self.members])
        x = model.embed_blocks(newest[owners][:, None]) + self._places[rows, filled][:, None]
        query_cos, query_sin, key_cos, key_sin = self._turns[rows, filled][:, None, None].unbind(3)
        rotary = Rotary((query_cos, query_sin), (key_cos, key_sin))
        behind = torch.arange(self.positions, device=owners.device) <= filled[:, None]
        mask = (self._visible[: len(owners)] & behind)[:, None, None]
        for layer, block in enumerate(model.blocks):
            x = block(x, rotary, mask, partial(self.cache.extend, layer, rows, filled))
        self._state[: len(owners)] = x[:, 0]
        self._filled[: self.rows] += 1

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The next block [Q, k] of each member, token by token, and whether [Q] it came of finite numbers."""
        model, members, layout = self.model, self.members, self._now()
        inner = [member.inner[len(member.blocks)] for member in members]
        size, device = len(inner[0]), self._state.device
        on_grid = torch.tensor(inner, device=device)
        numbers = torch.stack([torch.rand(size, generator=member.generator, device=device) for member in members])
        state, tokens = self._state[: len(layout.owners_R)], list[Tensor]()
        for place in range(size):
            for member, its in zip(members, inner, strict=True):
                if its[place] and member.may_draw():
                    member.count += 1
            feature = state if model.inside is None else model.inside.feature(state + model.inside.place[place])
            logits = model.head(model.norm(feature)).float()
            away = logits[layout.away_Q]
            guided = away + layout.scale_Q1 * (logits[layout.first_Q] - away)
            drawn = draw(guided, layout.choice, numbers[:, place])
            tokens.append(torch.where(on_grid[:, place], drawn, model.codebook_size))
            if model.inside is not None and place + 1 < size:
                before = model.codes(tokens[-1].clamp(max=model.last))[layout.owners_R]
                state = state + model.inside.before[place](before)
        return torch.stack(tokens, 1), guided.isfinite().all(-1)


def _whole(rows: int) -> int:
    """So many rows in whole units."""
    return -(-rows // UNIT) * UNIT


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
    """One `Sampling` alone: int64 [t, h, w]."""
    t, h, w = model.block_grid(grid)
    sampling = Sampling((text_1LE, mask_1L), context_thw, grid, options, generator, on_token, against, times_t)
    batch = SamplingBatch(model, mask_1L.shape[1] + t * h * w)
    batch.join(sampling)
    while not sampling.ended:
        batch.step()
    return sampling.result
