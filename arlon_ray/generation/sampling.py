"""Tokens drawn from the AR: of one request, or of many that share its steps, each at its own place.

A step is one block of tokens for every member. Rows of the batch are what the transformer runs on: a member has one,
or two that are guided apart (its text, and what it leads away from). On a CPU a row's bits do not depend on the rows
beside it, if there are never fewer than `UNIT` and always whole units (fewer rows take other kernels): so a member
draws the same tokens in every batch, alone too. On a GPU the kernels are chosen by the number of rows, and tokens may
differ where two were all but equally likely.

Legend: R rows, Q members, P positions, C channels, D channels a head, K codes, k tokens of a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.generation.batching import Member
from arlon_ray.generation.decoder import Decoder, Graphs, Layout
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.trunk import turns
from arlon_ray.models.ar import ArTransformer, Grid

#: So many steps the host may be ahead of a GPU.
AHEAD = 4


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
        self.count = context_thw.numel()
        # blocks that there are and that there will be, and positions that are filled
        self.done = self.total = self.filled = 0
        self.inner: list[list[bool]] = []

    def may_draw(self) -> bool:
        """Whether it goes on with its next token: it may be stopped."""
        if self.error is None and self.on_token is not None:
            try:
                self.on_token(self.count)
            except Exception as error:
                self.error = error
        return self.error is None


class SamplingBatch:
    """A `Batch` of samplings on one cache: `most` members, each of at most `positions` (text, start and blocks).

    Members' rows lie one behind the other; where one leaves, those behind it move up. On a GPU the host runs a few
    steps ahead: what `on_token` says holds for the step that it was asked before, and numbers that are not finite are
    noticed when their member ends. `held`: what it has on the device stays there while it has no members.
    """

    def __init__(
        self,
        model: ArTransformer,
        positions: int,
        most: int = 1,
        by_index: bool | None = None,
        fused: bool | None = None,
        held: bool = True,
    ) -> None:
        self.model, self.most, self.positions, self._held = model, most, positions, held
        self._make = partial(Decoder, model, positions, most, by_index, fused)
        self.members: list[Sampling] = []
        self._ahead: deque[torch.cuda.Event] = deque()
        self._arranged = False
        if held:
            self._take_memory()

    def _take_memory(self) -> None:
        self.decoder = self._make()
        cuda = self.decoder.device.type == "cuda"
        self._graphs = Graphs(self.decoder.device) if cuda and self.decoder.by_index else None

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
        ends = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        seen = int((mask.any(0) * ends).max())  # behind it is padding alone
        text, mask = text[:, :seen], mask[:, :seen]
        grid, length = model.block_grid(member.grid), mask.shape[1]
        member.total = grid[0] * grid[1] * grid[2]
        blocks = model.to_blocks(member.context[None])
        if length + member.total > self.positions:
            raise ValueError(f"{length} text tokens and {member.total} blocks: expected {self.positions} at most")
        if blocks.shape[1] == member.total:
            member.end(member.context)
            return
        if not self._held and not self.members:
            self._take_memory()
        decoder = self.decoder
        x, attention = model.embed(text, mask, blocks.expand(len(text), -1, -1), grid, member.times)
        member.filled = x.shape[1]
        rotary = model.rotary(length, grid, length + member.total, x.device, member.times)
        rows = slice(self.rows, self.rows + member.rows)
        for layer, block in enumerate(model.blocks):
            x = block(x, rotary.part(0, member.filled), attention, partial(decoder.cache.begin, layer, rows))
        decoder.turns[rows, : length + member.total] = turns(rotary)
        decoder.places[rows, length : length + member.total] = model.places(grid, member.times)
        decoder.visible[rows] = F.pad(mask, (0, decoder.visible.shape[1] - length), value=True)
        decoder.unseen[rows] = torch.zeros_like(decoder.unseen[rows]).masked_fill_(~decoder.visible[rows], -torch.inf)
        decoder.filled[rows], decoder.state[rows] = member.filled, x[:, -1]
        self._prepare(member, blocks[0])
        self.members.append(member)
        self._arranged = False

    def _prepare(self, member: Sampling, blocks_Nk: Tensor) -> None:
        """Give it its random numbers, and what it goes on from."""
        model, decoder, slot = self.model, self.decoder, len(self.members)
        member.done = len(blocks_Nk)
        shape = (member.total - member.done, blocks_Nk.shape[1])
        numbers = torch.rand(shape, generator=member.generator, device=decoder.device)
        inner = model.to_blocks(torch.zeros(1, *member.grid, dtype=torch.long))[0] <= model.last
        member.inner = inner.tolist()
        decoder.numbers[slot, member.done : member.total] = numbers
        decoder.inner[slot, : member.total] = inner.to(decoder.device)
        decoder.drawn[slot, : member.done] = blocks_Nk
        decoder.count[slot], decoder.fine[slot] = member.done, True

    def leave(self, member: Sampling) -> None:
        """See Batch."""
        place = self.members.index(member)
        first = sum(other.rows for other in self.members[:place])
        for tensors, begin, width, until in (
            (self.decoder.of_rows(), first, member.rows, self.rows),
            (self.decoder.of_members(), place, 1, len(self.members)),
        ):
            for tensor in tensors:
                tensor[begin : until - width] = tensor[begin + width : until].clone()
        self.members.remove(member)
        self._arranged = False
        if not self._held and not self.members:  # with the weights that they have laid out, or read
            self._ahead.clear()
            del self.decoder, self._graphs

    def step(self) -> list[Sampling]:
        """See Batch: a block for each member, then the transformer on those that have more to come."""
        if not self.members:
            return []
        self._ask()
        going_on = not any(member.error or member.done + 1 == member.total for member in self.members)
        if self._graphs is not None and going_on:
            self._run("both")
        else:
            self._run("draw")
        for member in self.members:
            member.done += 1
        ended = self._end()
        if self.members and not (self._graphs is not None and going_on):
            self._run("advance")
        for member in self.members:
            member.filled += 1
        return ended

    def _ask(self) -> None:
        """Whether each may go on, before every token of the next block."""
        for member in self.members:
            for inner in member.inner[member.done]:
                if inner and member.may_draw():
                    member.count += 1

    def _end(self) -> list[Sampling]:
        """Those that ended with this step leave."""
        decoder, complete = self.decoder, [member.done == member.total for member in self.members]
        if self._graphs is None or any(complete):
            for member, fine in zip(self.members, decoder.fine[: len(self.members)].tolist(), strict=True):
                if member.error is None and not fine:
                    member.error = FloatingPointError("what the AR predicts is not finite numbers")
        for slot, member in enumerate(self.members):
            if member.error is None and complete[slot]:
                drawn = decoder.drawn[slot, : member.total].clone()
                member.end(self.model.from_blocks(drawn[None], member.grid)[0])
        ended = [member for member in self.members if member.ended]
        for member in ended:
            self.leave(member)
        return ended

    def _run(self, what: str) -> None:
        decoder = self.decoder
        if not self._arranged:
            decoder.arrange(self._layout())
            self._arranged = True
        furthest = max(member.filled for member in self.members)

        def work() -> None:
            if what != "advance":
                decoder.draw()
            if what != "draw":
                decoder.advance(furthest, self._runs())

        if self._graphs is None:
            work()
        else:
            self._graphs.run((what, decoder.bucket(furthest), *decoder.kind()), work)
            self._wait_for_the_device()

    def _wait_for_the_device(self) -> None:
        """Let it be no more than a few steps behind, so that those who join or give up need not wait long."""
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > AHEAD:
            self._ahead.popleft().synchronize()

    def _layout(self) -> Layout:
        owners = [number for number, member in enumerate(self.members) for _ in range(member.rows)]
        away = [end - 1 for end in accumulate(member.rows for member in self.members)]
        first = [last + 1 - member.rows for last, member in zip(away, self.members, strict=True)]
        # rows that fill up the last unit are counted as the first member's
        owners += [0] * (self.decoder.whole(len(owners)) - len(owners))
        self.decoder.filled[self.rows :] = 0
        return Layout(owners, first, away, [member.options for member in self.members])

    def _runs(self) -> list[tuple[int, int, int]]:
        """Rows that are equally far: (first, end, filled)."""
        runs: list[tuple[int, int, int]] = []
        end = 0
        for member in self.members:
            first, end = end, end + member.rows
            if runs and runs[-1][2] == member.filled:
                first = runs.pop()[0]
            runs.append((first, end, member.filled))
        return runs


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
