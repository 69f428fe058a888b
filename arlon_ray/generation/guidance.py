"""The DiT's velocity under text and token guidance: of one segment, and of many in one forward pass.

Legend: C latent channels, t×h×w latent grid, V texts of a segment, R branches (rows of a batch) of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from arlon_ray.diffusion.rectified_flow import NUM_TIMES
from arlon_ray.generation.lanes import lanes, side_by_side
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.dit import Condition, LateLayers, STDiT3, TimeFeatures, join_conditions, some_samples

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class GuidedVelocity:
    """The velocity field of one segment; everything constant is in it. Called with x [1, C, t, h, w] and time [1]."""

    dit: STDiT3
    shape: Grid
    condition: Condition  # of R rows
    noisy_Rt: Tensor  # True: a frame that carries noise
    terms: list[int]  # how many rows v(text, tokens), v(null, tokens) and v(text) have
    weights: list[float]
    shares_Vt: Tensor | None
    interval: tuple[float, float] = (0.0, 1.0)  # of time/1000, both ends in it: where there is guidance

    @torch.no_grad()
    def __call__(self, x_1Cthw: Tensor, time_1: Tensor) -> Tensor:
        # a device is asked for its time only where that matters
        field = self if self.interval == (0.0, 1.0) else self.at(float(time_1))
        return velocities(Together([field]), [x_1Cthw], [time_1])[0]

    def at(self, time: float) -> GuidedVelocity:
        """The field at a time in [0, 1000]: outside of the interval it is v(text, tokens) alone, and costs less."""
        low, high = self.interval
        return self if not self.weights or low <= time / NUM_TIMES <= high else self._unguided

    @cached_property
    def _unguided(self) -> GuidedVelocity:
        count = self.terms[0]
        condition = some_samples(self.condition, slice(count))
        return replace(self, condition=condition, noisy_Rt=self.noisy_Rt[:count], terms=[count], weights=[])

    def kind(self) -> tuple[object, ...]:
        """Fields of the same kind can share a forward pass."""
        return self.dit, self.shape, tuple(self.condition.injection)

    def rows(self, x_1Cthw: Tensor, time_1: Tensor) -> tuple[Tensor, TimeFeatures]:
        """What the model is given of x and its time. By itself, so that its bits do not depend on the batch."""
        count = len(self.noisy_Rt)
        features = self.dit.times(time_1, self.condition.fps_BD[:1], self.noisy_Rt[:1], self._clean)
        tokens = self.dit.embed(x_1Cthw).expand(count, -1, -1, -1, -1)
        return tokens, TimeFeatures(*(feature.expand(count, *feature.shape[1:]) for feature in features))

    @cached_property
    def _clean(self) -> tuple[Tensor, Tensor]:
        return self.dit.clean_time(self.condition.fps_BD[:1])

    def guided(self, velocities_RCthw: Tensor) -> Tensor:
        """The branches' velocities as one [1, C, t, h, w]."""
        both, *others = (self._mean(part) for part in velocities_RCthw.split(self.terms))
        guidance = (w * (both - other) for w, other in zip(self.weights, others, strict=True))
        return sum(guidance, both)

    def _mean(self, of_texts: Tensor) -> Tensor:
        if len(of_texts) == 1:
            return of_texts
        return torch.einsum("vt,vcthw->cthw", self.shares_Vt, of_texts)[None]


class Together:
    """Fields of one kind, side by side: what is constant is put together once, and dealt out to lanes (`spread`)."""

    def __init__(self, fields: Sequence[GuidedVelocity], spread: bool = True) -> None:
        self.fields = list(fields)
        self.counts = [len(field.noisy_Rt) for field in fields]
        self.dit, self.shape = fields[0].dit, fields[0].shape
        condition = join_conditions([field.condition for field in fields])
        noisy_Rt = torch.cat([field.noisy_Rt for field in fields])
        # processes that share a segment's frames speak to one another in turn
        self._lanes = lanes(len(noisy_Rt)) if spread and not self.dit.parallel else [slice(None)]
        self._constant = [(some_samples(condition, rows), noisy_Rt[rows]) for rows in self._lanes]

    def velocity(self, tokens_RTHWD: Tensor, times: TimeFeatures, late: LateLayers | None) -> Tensor:
        """The velocity [R, C, t, h, w] of all branches; `late` is that of all."""
        parts = [
            None if late is None else LateLayers(late.count, None if late.added is None else late.added[rows])
            for rows in self._lanes
        ]

        def computed(lane: int) -> Tensor:
            rows, (condition, noisy_Rt) = self._lanes[lane], self._constant[lane]
            its = TimeFeatures(*(feature[rows] for feature in times))
            return self.dit.velocity(
                self.dit.denoise(tokens_RTHWD[rows], self.shape, its, condition, noisy_Rt, parts[lane])
            )

        made = side_by_side([partial(computed, lane) for lane in range(len(self._lanes))])
        if late is not None and late.added is None:
            late.added = torch.cat([part.added for part in parts if part is not None and part.added is not None])
        return made[0] if len(made) == 1 else torch.cat(made)


class StepCache:
    """One segment's late layers: every `every`-th evaluation computes the last `layers`, the others reuse the latest.

    Evaluations 0, `every`, 2·`every`, … compute them: FORA's fixed interval (Selvaraju et al. 2024) for the residual of
    the late layers alone. `layers` = 0: nothing is kept, and every evaluation is the plain one.
    """

    def __init__(self, layers: int, every: int) -> None:
        self.every, self.late = every, LateLayers(layers) if layers else None

    def at(self, evaluation: int, rows: int) -> LateLayers | None:
        """What an evaluation of so many rows is given; fewer than before are the first of them."""
        if self.late is not None and self.late.added is not None:
            fits = rows <= len(self.late.added) and evaluation % self.every
            self.late.added = self.late.added[:rows] if fits else None
        return self.late


def velocities(
    together: Together, xs: Sequence[Tensor], times: Sequence[Tensor], lates: Sequence[LateLayers | None] | None = None
) -> list[Tensor]:
    """The velocity [1, C, t, h, w] of each field at its x [1, C, t, h, w] and time [1], in one forward pass.

    `lates`: of each field; as many layers for all, and either all of them have something to reuse or none has.

    On a CPU, with one thread an operation, each is to the last bit what it is alone: rows of a product of matrices do
    not depend on each other, and what would (few rows, for which there are other kernels) is computed field by field.
    With more threads, and on a GPU, where kernels are chosen by the size of the batch, they are equal within rounding.
    """
    rows = [field.rows(x, time) for field, x, time in zip(together.fields, xs, times, strict=True)]
    embedded, features = rows[0]
    if len(rows) > 1:
        embedded = torch.cat([tokens for tokens, _ in rows])
        features = TimeFeatures(*map(torch.cat, zip(*(features for _, features in rows), strict=True)))
    kept = [late for late in lates or () if late is not None]
    late = LateLayers(kept[0].count) if kept else None
    if late is not None and kept[0].added is not None:
        late.added = torch.cat([each.added for each in kept if each.added is not None])
    output = together.velocity(embedded, features, late)
    if late is not None and late.added is not None and kept[0].added is None:
        for each, part in zip(kept, late.added.split(together.counts), strict=True):
            each.added = part
    parts = output.split(together.counts)
    return [field.guided(part) for field, part in zip(together.fields, parts, strict=True)]


def _length(mask_L: Tensor) -> int:
    """Real tokens of a text. Raises ValueError if there is padding before one of them, or none."""
    length = int(mask_L.sum())
    if not length or not bool(mask_L[:length].all()):
        raise ValueError(f"text mask {mask_L.int().tolist()}: expected real tokens first, then padding")
    return length


def guided_velocity(
    dit: STDiT3,
    latent_shape: Grid,
    text: tuple[Tensor, Tensor],
    coarse_1Cthw: Tensor | None,
    noisy_1t: Tensor | None,
    fps: float,
    size: tuple[int, int],
    options: GenerationOptions,
    shares_Vt: Tensor | None = None,
    negative: tuple[Tensor, Tensor] | None = None,
) -> GuidedVelocity:
    """The velocity field of one segment, with text and token guidance of their own scales.

    v = v(text, tokens) + (s_text − 1)·(v(text, tokens) − v(null, tokens))
      + (s_token − 1)·(v(text, tokens) − v(text)).
    With several texts [V, L, E], v(text, ·) of a latent frame is their mean, weighted by `shares_Vt`. `negative`
    [1, L, E] and its mask stand in for the null text. The branches are one batch; a scale of 1 needs no branch.
    `noisy_1t` marks the frames to make (None: all). Outside of the options' interval of times v = v(text, tokens):
    Kynkäänniemi et al. 2024.
    """
    values, mask = text
    texts, lengths = list(range(len(values))), [_length(its) for its in mask]
    # the null text is as long as the text that comes in
    null, null_length = dit.y_embedder.y_embedding[: values.shape[1]], lengths[-1]
    if negative is not None:
        null, null_length = negative[0][0], _length(negative[1][0])
    #: (text, or None for the null text; whether the tokens are seen), and how many branches each term has
    branches: list[tuple[int | None, bool]] = [(v, coarse_1Cthw is not None) for v in texts]
    terms, weights = [len(texts)], list[float]()
    if options.guidance_scale != 1.0:
        branches.append((None, coarse_1Cthw is not None))
        terms, weights = [*terms, 1], [*weights, options.guidance_scale - 1.0]
    if coarse_1Cthw is not None and options.token_guidance_scale != 1.0:
        branches += [(v, False) for v in texts]
        terms, weights = [*terms, len(texts)], [*weights, options.token_guidance_scale - 1.0]
    count, real = len(branches), tuple(null_length if v is None else lengths[v] for v, _ in branches)
    condition = dit.condition(
        latent_shape,
        torch.stack([null if v is None else values[v] for v, _ in branches])[:, : max(real)],
        real,
        values.new_full((count,), fps),
        size,
        coarse_1Cthw,
        torch.tensor([seen for _, seen in branches], device=values.device),
    )
    noisy = torch.ones(1, latent_shape[0], dtype=torch.bool, device=values.device) if noisy_1t is None else noisy_1t
    interval = (options.guidance_low, options.guidance_high)
    return GuidedVelocity(dit, latent_shape, condition, noisy.expand(count, -1), terms, weights, shares_Vt, interval)
