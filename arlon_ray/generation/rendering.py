"""The DiT renders one segment's new latents, guided by its tokens and held to the overlap with the one before.

Legend: C latent channels, t latent frames of a segment, o of them the overlap, n = t − o new, h×w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arlon_ray.bundle import Bundle
from arlon_ray.config import GROUP_LATENTS, Config
from arlon_ray.diffusion.rectified_flow import add_noise, schedule, time_ratio
from arlon_ray.diffusion.solvers import FlowPath
from arlon_ray.generation.batching import Member, run_alone
from arlon_ray.generation.guidance import GuidedVelocity, StepCache, Together, guided_velocity, velocities
from arlon_ray.generation.lanes import in_lanes
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.seeds import segment_generator
from arlon_ray.generation.storyboard import SegmentText, begins_shot, first_of_prompt, goes_on, words_of
from arlon_ray.latest import Latest
from arlon_ray.models.dit import LateLayers

#: What fields share is kept of so many of the latest sets: intervals and caches make them change from step to step.
_KEPT = 8


@dataclass(frozen=True)
class SegmentLatents:
    """One segment's new latents, float32 [C, n, h, w]."""

    index: int
    latents: np.ndarray


@dataclass(frozen=True)
class HandOver:
    """What one segment of a video hands on to the next: latents [C, k, h, w], the last `overlap` of which are its end.

    Before them are the first `anchor` latents that its prompt began with, where the DiT looks back on those
    (`dit.anchor_groups`): what is handed on from segment to segment alone drifts. `texts` are those of the segments.
    """

    overlap: int
    anchor: int
    texts: Sequence[SegmentText]

    @classmethod
    def of(cls, config: Config, texts: Sequence[SegmentText]) -> HandOver:
        """As a bundle of this configuration hands over."""
        return cls(config.segment.overlap_latents, config.anchor_latents, texts)

    def taken(self, handed: np.ndarray | None, index: int) -> np.ndarray | None:
        """What segment `index` takes over of it: a prompt does not look back on what another one began with, and a
        new shot on nothing.
        """
        if handed is None or goes_on(self.texts, index):
            return handed
        return None if index and begins_shot(self.texts, index) else handed[:, -self.overlap :]

    def after(self, taken: np.ndarray | None, made: np.ndarray, index: int) -> np.ndarray:
        """What segment `index` hands on, which has taken over `taken` and made the latents `made`."""
        history = behind_overlap(taken, made)
        end = history[:, -self.overlap :]
        if not self.anchor or end.shape[1] < self.overlap:
            return end
        if taken is not None and taken.shape[1] > self.overlap:
            begin = taken  # begins with the anchor
        else:
            first = first_of_prompt(self.texts, index)
            begin = history[:, -(index + 1 - first) * made.shape[1] :] if first else history
        return np.concatenate([begin[:, : self.anchor], end], axis=1)

    def anchored(self, found: np.ndarray, begun: np.ndarray) -> np.ndarray:
        """What a later segment takes over whose overlap is `found`, and whose prompt began with the latents `begun`."""
        if not self.anchor or found.shape[1] < self.overlap:
            return found
        return np.concatenate([begun[:, : self.anchor], found], axis=1)


def behind_overlap(overlap: np.ndarray | None, latents: np.ndarray) -> np.ndarray:
    """A segment's new latents [C, n, h, w] behind what it took over; its end is what the next segment takes over.

    New latents may be fewer than an overlap: the rest then comes from what was taken over.
    """
    return latents if overlap is None else np.concatenate([overlap, latents], axis=1)


def _given_latents(name: str, latents: np.ndarray | None, sizes: tuple[int, int, int], most: int | None = None) -> int:
    """How many latent frames are given. Raises ValueError if they are not [C, 1 to `most`, h, w]."""
    if latents is None:
        return 0
    channels, height, width = sizes
    count = latents.shape[1] if latents.ndim == 4 else 0
    if latents.shape != (channels, count, height, width) or not 1 <= count <= (most or count):
        expected = f"[{channels}, {f'1 to {most}' if most else 'n'}, {height}, {width}]"
        raise ValueError(f"{name} of shape {list(latents.shape)}: expected {expected}")
    return count


class Denoising(Member[SegmentLatents]):
    """One segment on its way from noise to latents. `on_step(i)` is called before each evaluation and may raise."""

    def __init__(
        self,
        index: int,
        field: GuidedVelocity,
        path: FlowPath,
        new: slice,
        cache: StepCache,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.index, self.field, self.path, self.new, self.cache = index, field, path, new, cache
        self.on_step = on_step

    def begin_step(self) -> bool:
        """Whether it goes on: it may be stopped."""
        try:
            if self.on_step is not None:
                self.on_step(self.path.evaluations)
        except Exception as error:
            self.error = error
        return self.error is None

    def wanted(self) -> tuple[GuidedVelocity, LateLayers | None]:
        """What is to be evaluated at `path.x`, and its late layers."""
        field = self.field.at(self.path.time)
        return field, self.cache.at(self.path.evaluations, len(field.noisy_Rt))

    def finish(self) -> None:
        """Take what was made as the result, if there are no more steps to go."""
        if not self.path.ended:
            return
        latents = self.path.x[0, :, self.new].cpu().numpy()
        if np.isfinite(latents).all():
            self.end(SegmentLatents(self.index, latents))
        else:
            self.error = FloatingPointError(f"the latents of segment {self.index} are not finite numbers")


class DenoisingBatch:
    """A `Batch` of segments: those of one kind (`GuidedVelocity.kind`) share a forward pass.

    A step of it is one evaluation of each, whichever its solver, and whichever step of its own that is part of.
    """

    def __init__(self, most: int = 1) -> None:
        self.most, self.members = most, list[Denoising]()
        self._together: Latest[tuple[GuidedVelocity, ...], Together] = Latest(_KEPT)

    def has_room(self) -> bool:
        """See Batch."""
        return len(self.members) < self.most

    def join(self, member: Denoising) -> None:
        """See Batch."""
        self.members.append(member)
        self._together.clear()

    def leave(self, member: Denoising) -> None:
        """See Batch."""
        self.members.remove(member)
        self._together.clear()

    @torch.no_grad()
    def step(self) -> list[Denoising]:
        """See Batch."""
        ended = [member for member in self.members if not member.begin_step()]
        for member in ended:
            self.leave(member)
        kinds: dict[tuple[object, ...], list[tuple[Denoising, GuidedVelocity, LateLayers | None]]] = {}
        for member in self.members:
            field, late = member.wanted()
            reuse = late and (late.count, late.added is None)
            kinds.setdefault((*field.kind(), reuse), []).append((member, field, late))
        for same in kinds.values():
            members, fields, lates = zip(*same, strict=True)
            with in_lanes(fields[0].noisy_Rt.device):
                # in a batch for many, one alone leaves the processor to the other stages: two lanes of a row each
                # take a quarter more of it than one lane
                spread = len(fields) > 1 or self.most == 1
                together = self._together.get(fields) or self._together.put(fields, Together(fields, spread))
                paths = [member.path for member in members]
                velocity = velocities(together, [p.x for p in paths], [p.time_B for p in paths], lates)
                for member, its in zip(members, velocity, strict=True):
                    member.path.advance(its)
                    member.finish()
        done = [member for member in self.members if member.ended]
        for member in done:
            self.leave(member)
        return ended + done


class DiTRenderer:
    """Renders segments of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config = bundle, bundle.config
        self.text = bundle.text
        self.codec = bundle.codec if bundle.guided else None
        self.dit = bundle.dit if bundle.guided else bundle.baseline

    def render(
        self,
        prompt: SegmentText,
        tokens: np.ndarray | None,
        overlap: np.ndarray | None,
        seed: int,
        index: int,
        options: GenerationOptions,
        on_step: Callable[[int], None] | None = None,
        after: np.ndarray | None = None,
    ) -> SegmentLatents:
        """Render segment `index`: `tokens` [t', h', w'] (None with `options.baseline`), `overlap` float32 [C, k, h, w].

        `overlap` is what the segment before handed on (`HandOver`): at most the o latents of its end, before them the
        anchor; or what the first one starts from (`Given`). None: nothing, a new shot begins. A later segment has n new
        latents whatever it takes over. `after` [C, m, h, w], whole groups, is what
        comes behind the segment, where that is there already: then the tokens are those of t + m latents. Both stay
        exactly as they are, and are not part of what is returned. `on_step(i)` is called before every evaluation of the
        DiT (`options.evaluations`) and may raise. Raises ValueError on shapes that do not fit, and FloatingPointError
        if what was made is not finite.
        """
        request = self.rendering(prompt, tokens, overlap, seed, index, options, on_step, after)
        return run_alone(DenoisingBatch(), request)

    @torch.no_grad()
    def rendering(
        self,
        prompt: SegmentText,
        tokens: np.ndarray | None,
        overlap: np.ndarray | None,
        seed: int,
        index: int,
        options: GenerationOptions,
        on_step: Callable[[int], None] | None = None,
        after: np.ndarray | None = None,
    ) -> Generator[Denoising, SegmentLatents, SegmentLatents]:
        """`render` as a request for a batch. In each batch it becomes what it is alone (`velocities`)."""
        device, segment = self.bundle.device, self.config.segment
        height, width = self.config.latent_grid
        channels = self.dit.config.in_channels
        model = self.bundle.baseline if options.baseline else self.dit
        most = segment.overlap_latents + self.config.anchor_latents
        kept = _given_latents("overlap", overlap, (channels, height, width), most)
        anchor = max(0, kept - segment.overlap_latents)
        if overlap is not None and anchor and not model.config.anchor_groups:  # the baseline was not trained with one
            overlap, kept, anchor = overlap[:, anchor:], kept - anchor, 0
        behind = _given_latents("after", after, (channels, height, width))
        if behind % GROUP_LATENTS:
            raise ValueError(f"after has {behind} latent frames: expected whole groups of {GROUP_LATENTS}")
        # the first segment fills up what it is given; a later one takes over what its shot has, which may be less
        missing = segment.overlap_latents - (kept - anchor) if index else 0
        shown = segment.latents - missing + behind  # without the anchor
        shape = (anchor + shown, height, width)
        given = torch.zeros(1, channels, *shape, device=device)
        noisy = torch.ones(1, shape[0], dtype=torch.bool, device=device)
        end = anchor + shown - behind
        for known, where in ((overlap, slice(kept)), (after, slice(end, None))):
            if known is not None:
                given[0, :, where] = torch.from_numpy(known).to(device)
                noisy[:, where] = False
        size = (self.config.video.height, self.config.video.width)
        if options.cache_layers >= (depth := model.config.depth):
            raise ValueError(f"cache_layers={options.cache_layers}: expected at most {depth - 1} of {depth} layers")
        with in_lanes(device):
            coarse = None if options.baseline else self._coarse(tokens, missing + shown)[:, :, missing:]
            text, shares = self._encoded(prompt, missing, anchor, behind)
            negative = self.text.encode([options.negative_prompt]) if options.negative_prompt else None
        generator = segment_generator(seed, index, "dit", device)
        noise = torch.randn(1, channels, shown, height, width, generator=generator, device=device)
        ratio = time_ratio(*size, shown, self.config.dit.time_base_pixels) * self.config.dit.time_scale
        times = schedule(options.steps, ratio * options.time_shift, options.start)
        if options.start < 1.0:
            if coarse is None:
                raise ValueError(f"start={options.start}: the baseline has no tokens to start from; expected 1")
            noise = add_noise(coarse, noise, noise.new_full((1,), times[0]))
        if anchor:  # its guide is itself
            noise = torch.cat([given[:, :, :anchor], noise], 2)
            coarse = None if coarse is None else torch.cat([given[:, :, :anchor], coarse], 2)
        path = FlowPath(noise, times, (noisy, given), options.solver)
        cache = StepCache(options.cache_layers, options.cache_every)
        fps, new = self.config.video.fps, slice(kept, end)
        with self.bundle.at_work(model):
            with in_lanes(device):
                field = guided_velocity(model, shape, text, coarse, noisy, fps, size, options, shares, negative)
            return (yield Denoising(index, field, path, new, cache, on_step))

    def _encoded(
        self, text: SegmentText, missing: int, before: int, behind: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Embeddings [V, L, E] and mask [V, L] of a segment's texts, and their shares of each latent frame.

        `missing`: frames at its beginning that are not there. `before`, `behind`: frames that are given there, which
        have the shares of its first and of its last one.
        """
        words = words_of(text)
        if isinstance(words, str):
            return self.text.encode([words]), None
        shares = torch.tensor(words.shares, device=self.bundle.device)[:, missing:]
        ends = shares[:, :1].expand(-1, before), shares[:, -1:].expand(-1, behind)
        return self.text.encode(list(words.prompts)), torch.cat([ends[0], shares, ends[1]], 1)

    def _coarse(self, tokens: np.ndarray | None, latents: int) -> Tensor:
        if self.codec is None:
            raise ValueError("this bundle is text-only: ask for the baseline")
        if tokens is None:
            raise ValueError("no tokens: the guided DiT needs the AR's plan; ask for the baseline to render without")
        expected = self.codec.grid(latents, *self.config.latent_grid)
        if tokens.shape != expected:
            raise ValueError(f"tokens of shape {list(tokens.shape)}: expected {list(expected)}")
        return self.codec.decode(torch.from_numpy(tokens)[None].long().to(self.bundle.device), self.config.latent_grid)
