"""The state of sequences that are drawn at the same time, and the step that takes each of them one block further.

All of it lies in buffers that never move, and a step reads where it is from them: on a GPU it is captured once and
replayed (`Graphs`), and nothing waits for the device. Random numbers are drawn when a member enters.

Legend: R rows, Q members, N blocks, P positions, C channels, D channels a head, K codes, k tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import getLogger
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from arlon_ray.generation.fused import FusedTrunk, agrees, fused_trunk
from arlon_ray.generation.native_step import native_step
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.products import Norm, Products
from arlon_ray.generation.trunk import Attention, AttentionByIndex, AttentionByRuns, Trunk
from arlon_ray.latest import Latest
from arlon_ray.models.ar import ArTransformer, KeyValueCache

#: On a device whose host does not know how far a row is, so many positions at a time are attended to.
BUCKET = 256
#: Captured steps that are kept: what changes a step is how many members there are, and how far they are (`BUCKET`).
GRAPHS = 64


class Choice(NamedTuple):
    """How each of Q members draws: all [Q]. `limited`: whether any has a top-k."""

    temperature: Tensor
    top_k: Tensor  # 0: all codes
    top_p: Tensor
    limited: bool = True

    @classmethod
    def of(cls, options: list[GenerationOptions], device: torch.device) -> Choice:
        """Of the members' options."""
        return cls(
            torch.tensor([o.temperature for o in options], device=device),
            torch.tensor([o.top_k for o in options], device=device),
            torch.tensor([o.top_p for o in options], device=device),
            any(o.top_k for o in options),
        )


def draw(logits_QK: Tensor, choice: Choice, numbers_Q: Tensor) -> Tensor:
    """A token for each member (int64 [Q]) after temperature, top-k and top-p (nucleus).

    Sorts once and inverts the cumulative distribution at the random numbers in [0, 1); nothing waits for the device.
    """
    chances, order = (logits_QK.float() / choice.temperature[:, None]).softmax(-1).sort(descending=True)
    codes = chances.shape[-1]
    last: Tensor | int = codes - 1
    if choice.limited:
        most = torch.where(choice.top_k > 0, choice.top_k.clamp(max=codes), codes)
        chances, last = chances * (torch.arange(codes, device=chances.device) < most[:, None]), most - 1
    summed = chances.cumsum(-1)
    # the first codes, at least one
    kept = (summed - chances < choice.top_p[:, None] * summed[:, -1:]) & (chances > 0)
    point = numbers_Q * (chances * kept).sum(-1)
    place = (summed <= point[:, None]).sum(-1)
    place = place.clamp(max=last) if isinstance(last, int) else torch.minimum(place, last)
    return order.gather(1, place[:, None])[:, 0]


class Layout(NamedTuple):
    """Whose rows are whose, and how members draw: changes when one enters or leaves. Lists of R or Q."""

    owners: list[int]
    first: list[int]  # each member's row with its text,
    away: list[int]  # and the one that it is guided away from (the same, where it is not guided)
    options: list[GenerationOptions]

    @property
    def guided(self) -> bool:
        """Whether any member is."""
        return self.first != self.away


class Decoder:
    """Up to `most` members with one or two rows each, of up to `positions` (text, start and blocks).

    `by_index`: as on a GPU, where the host does not look at what is drawn (None: on a GPU). `fused`: through Triton's
    kernels, where they run (None: on a GPU).
    """

    def __init__(
        self,
        model: ArTransformer,
        positions: int,
        most: int,
        by_index: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self.model = model
        weight = model.head.weight
        self.device = weight.device
        self.by_index = self.device.type == "cuda" if by_index is None else by_index
        products = Products(weight)
        rows, self.positions = products.whole(2 * most), positions
        stored = -(-positions // BUCKET) * BUCKET if self.by_index else positions
        self.whole = products.whole
        self.cache = KeyValueCache(model, rows, stored)
        dim, size = model.config.dim, model.config.block[0] * model.config.block[1]
        # what each row has at each position: rotations (of queries, of keys), place embeddings, whether it is seen
        pairs = dim // model.config.heads // 2
        self.turns = torch.zeros(rows, stored, 2, pairs, device=self.device, dtype=torch.complex64)
        self.places = torch.zeros(rows, stored, dim, device=self.device, dtype=weight.dtype)
        self.visible = torch.zeros(rows, stored, dtype=torch.bool, device=self.device)
        self.unseen = torch.zeros(rows, stored, device=self.device, dtype=weight.dtype)
        # how many positions are filled, and the transformer's output at the last of them
        self.filled = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.state = torch.zeros(rows, dim, device=self.device, dtype=weight.dtype)
        # of each member: random numbers, tokens within the grid, tokens drawn, blocks drawn, whether of finite numbers
        self.numbers = torch.zeros(most, positions, size, device=self.device)
        self.inner = torch.ones(most, positions, size, device=self.device, dtype=torch.bool)
        self.drawn = torch.zeros(most, positions, size, device=self.device, dtype=torch.long)
        self.count = torch.zeros(most, dtype=torch.long, device=self.device)
        self.fine = torch.ones(most, dtype=torch.bool, device=self.device)
        # the layout
        self._owners, self._slots = (torch.zeros(n, dtype=torch.long, device=self.device) for n in (rows, most))
        self._first, self._away = torch.zeros_like(self._slots), torch.zeros_like(self._slots)
        self._scale = torch.ones(most, 1, device=self.device)
        self._choice = Choice.of([GenerationOptions()] * most, self.device)
        self._slots.copy_(torch.arange(most))
        self._row_starts = torch.arange(rows, device=self.device) * stored
        self.layout = Layout([], [], [], [])
        self._native = None
        if not self.by_index:
            of_rows = self.turns, self.filled, self.visible
            of_members = self._owners, self._first, self._away, self._scale, *self._choice[:3], self.fine
            self._native = native_step(model, products, self.cache, of_rows, of_members)
        self._take_weights(products)
        self._fused: FusedTrunk | None = None
        if self.by_index and (self.device.type == "cuda" if fused is None else fused):
            self._fused = self._tried(fused_trunk(model))

    @torch.no_grad()
    def _tried(self, fused: FusedTrunk | None) -> FusedTrunk | None:
        """Kernels that run here, and agree with plain operations."""
        if fused is None:
            return None
        x = torch.randn(2, self.model.config.dim, device=self.device).to(self.state.dtype)
        try:
            for rows in (1, 2):
                attention = AttentionByIndex(self.cache, self.filled[:rows], self.visible.logical_not(), BUCKET)
                arguments = x[:rows], self.turns, self._row_starts[:rows], attention
                if not agrees(self._trunk(*arguments), fused(*arguments)):
                    return None
        except Exception:  # whatever the compiler has to say
            getLogger(__name__).warning(
                "Triton's kernels do not run here: the AR goes on without, slower", exc_info=True
            )
            return None
        finally:
            self.cache.values.zero_()
        return fused

    def _take_weights(self, products: Products) -> None:
        model, inside = self.model, self.model.inside
        self._join = None if model.join is None else products.of(model.join)
        if self._native is not None:
            return
        self._trunk, self._head = Trunk(model, products), products.of(model.head, Norm.of(model.norm))
        if inside is not None:
            self._before = [products.of(layer) for layer in inside.before]  # type: ignore[arg-type]
            self._gate_up, self._down = products.of(inside.gate_up, Norm.of(inside.norm)), products.of(inside.down)

    def of_rows(self) -> tuple[Tensor, ...]:
        """What a row has."""
        return self.turns, self.places, self.visible, self.unseen, self.filled, self.state, self.cache.by_row

    def of_members(self) -> tuple[Tensor, ...]:
        """What a member has."""
        return self.numbers, self.inner, self.drawn, self.count, self.fine

    def arrange(self, layout: Layout) -> None:
        """Take over another layout."""
        self.layout = layout
        members, choice = len(layout.first), Choice.of(layout.options, self.device)
        for buffer, values in ((self._owners, layout.owners), (self._first, layout.first), (self._away, layout.away)):
            buffer[: len(values)] = torch.tensor(values, device=self.device)
        self._scale[:members, 0] = torch.tensor([o.ar_guidance_scale for o in layout.options], device=self.device)
        for buffer, new in zip(self._choice[:3], choice[:3], strict=True):
            buffer[:members] = new
        self._choice = self._choice._replace(limited=choice.limited)

    def kind(self) -> tuple[object, ...]:
        """What decides, beside the numbers in the buffers, what a step is."""
        layout = self.layout
        return len(layout.owners), len(layout.first), layout.guided, self._choice.limited

    @torch.no_grad()
    def draw(self) -> None:
        """The next block of each member, token by token."""
        model, members = self.model, len(self.layout.first)
        slots, count, owners = self._slots[:members], self.count[:members], self._owners[: len(self.layout.owners)]
        numbers, state = self.numbers[slots, count], self.state[: len(owners)]
        if self._native is not None:
            self.drawn[slots, count] = self._native.head(state, numbers, self.inner[slots, count])
            count += 1
            return
        temperature, top_k, top_p, limited = self._choice
        choice = Choice(temperature[:members], top_k[:members], top_p[:members], limited)
        tokens, inner = list[Tensor](), None if model.inside is None else self.inner[slots, count]
        for place in range(numbers.shape[1]):
            logits = self._guided(self._logits(self._feature(state, place)).float(), members)
            token = draw(logits, choice, numbers[:, place])
            if inner is not None:
                token = torch.where(inner[:, place], token, model.codebook_size)
            tokens.append(token)
            if place + 1 < numbers.shape[1]:
                state = self._before[place](model.codes(token.clamp(max=model.last))[owners], state)
        self.drawn[slots, count] = tokens[0][:, None] if len(tokens) == 1 else torch.stack(tokens, 1)
        self.fine[:members] &= logits.isfinite().all(-1)
        count += 1

    def _logits(self, feature: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused.head(feature, self.model.head)
        return self._head(feature)

    def _guided(self, logits_RK: Tensor, members: int) -> Tensor:
        if not (self.by_index or self.layout.guided):
            return logits_RK[:members]
        away = logits_RK[self._away[:members]]
        if not self.layout.guided:
            return away
        return away + self._scale[:members] * (logits_RK[self._first[:members]] - away)

    def _feature(self, state: Tensor, place: int) -> Tensor:
        """As `InnerHead.feature`."""
        if self.model.inside is None:
            return state
        state = state + self.model.inside.place[place]
        gate, up = self._gate_up(state).chunk(2, -1)
        return self._down(F.silu(gate).mul_(up), state)

    @torch.no_grad()
    def advance(self, furthest: int, runs: list[tuple[int, int, int]]) -> None:
        """Feed each member's newest block through the transformer.

        `furthest` is the largest number of positions that any row has filled; `runs` as `AttentionByRuns` has them.
        """
        members, rows = len(self.layout.first), len(self.layout.owners)
        real, filled = self.layout.away[-1] + 1, self.filled[:rows]
        newest = self.drawn[self._slots[:members], self.count[:members] - 1]
        at = self._row_starts[:rows] + filled
        embedded = self._embed(newest)
        if self.by_index or rows > members:
            embedded = embedded[self._owners[:rows]]
        x = embedded + self.places.flatten(0, 1)[at]
        self.state[:rows] = self._run_trunk(x, at, furthest, runs)
        self.filled[:real] += 1

    def _run_trunk(self, x_RC: Tensor, at_R: Tensor, furthest: int, runs: list[tuple[int, int, int]]) -> Tensor:
        if self._native is not None:
            return self._native.trunk(x_RC)
        attention: Attention
        if self.by_index:
            attention = AttentionByIndex(self.cache, self.filled[: len(x_RC)], self.visible, self.bucket(furthest))
        else:
            attention = AttentionByRuns(self.cache, runs, self.unseen)
        return (self._fused or self._trunk)(x_RC, self.turns, at_R, attention)

    def bucket(self, furthest: int) -> int:
        """How many positions are attended to."""
        return min(-(-(furthest + 1) // BUCKET) * BUCKET, self.visible.shape[1])

    def _embed(self, blocks_Qk: Tensor) -> Tensor:
        """As `ArTransformer.embed_blocks`."""
        if self._join is None:
            return self.model.codes(blocks_Qk[:, 0])
        inner = (blocks_Qk <= self.model.last)[..., None]
        return self._join((self.model.codes(blocks_Qk.clamp(max=self.model.last)) * inner).flatten(1))


Work = Callable[[], None]


class Graphs:
    """Works on buffers that do not move, captured as CUDA graphs, one a key: what is done first, is done plainly.

    A graph takes memory: those of the `most` keys that came last are kept, the others captured again when they come.
    """

    def __init__(self, device: torch.device, most: int = GRAPHS) -> None:
        self._device, self._seen = device, set[object]()
        self._graphs: Latest[object, torch.cuda.CUDAGraph] = Latest(most)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: object, work: Work) -> None:
        """`work`, which is the same work whenever it comes with this key."""
        if key not in self._seen:  # kernels are loaded, and the libraries take their memory
            self._seen.add(key)
            work()
            return
        graph = self._graphs.get(key)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
            ):
                work()
            if len(self._graphs) == self._graphs.most:
                torch.cuda.synchronize(self._device)  # the one that makes room may still be at work
            self._graphs.put(key, graph)
        graph.replay()
