"""What the stages that train on latents share: batches, windows of whole groups, and looking at latents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, LATENT_FRAMES
from arlon_ray.models.vae import VideoVAE, load_vae, to_frames
from arlon_ray.training.engine import Losses


class BatchSource(Protocol):
    """Batches: latents, text, text_mask, tokens_fine, tokens_coarse, clip_id, caption, fps, given_frames.

    The first `given_frames` (int64 [B]; missing: none) of a clip belong to an earlier caption than its own: they are
    shown as what a new prompt goes on from, and never asked for.
    """

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """This worker's share of the batch of `step`: a pure function of its arguments."""

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """The clips that training never sees."""


def group_window(available: int, groups: int, generator: torch.Generator | None) -> slice:
    """A window of at most `groups` of `available` groups, at a random place (without a generator: the first)."""
    count = min(groups, available)
    if generator is None:
        return slice(0, count)
    start = int(torch.randint(available - count + 1, (), generator=generator, device=generator.device))
    return slice(start, start + count)


def cut(values: Tensor, window: slice, available_groups: int, axis: int) -> Tensor:
    """The part of `values` that belongs to a window of groups; `axis` is its time axis."""
    per_group = values.shape[axis] // available_groups
    return values.narrow(axis, window.start * per_group, (window.stop - window.start) * per_group)


def is_given(batch: dict[str, Any], latents: int, per_token: int = 1) -> Tensor:
    """Which latent frames of the clips belong to an earlier caption, in whole or in part: bool [B, latents].

    With `per_token` latent frames to a token: which frames of tokens, [B, latents / per_token]. The first latent of a
    group stands for one frame, the others for four.
    """
    values = batch["text_mask"]
    if "given_frames" not in batch:
        return torch.zeros(len(values), latents // per_token, dtype=torch.bool, device=values.device)
    at = torch.arange(0, latents, per_token, device=values.device)
    begins = at // GROUP_LATENTS * GROUP_FRAMES + (at % GROUP_LATENTS - 1) * LATENT_FRAMES + 1
    return begins.where(at % GROUP_LATENTS > 0, at // GROUP_LATENTS * GROUP_FRAMES) < batch["given_frames"][:, None]


@torch.no_grad()
def on_held_out(
    objective: nn.Module, source: BatchSource, batch_size: int, device: torch.device, seed: int
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Loss and metrics of an objective on the held-out clips: means over all that it was asked for in them, so that
    clips with little to ask count for little. And their first batch, on the device; ({}, None) where nothing is asked.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    sums: dict[str, float] = {}
    asked, first = 0.0, None
    for batch in source.held_out_batches(batch_size):
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        losses: Losses = objective(moved, generator)
        weight = float(losses.tokens if losses.asked is None else losses.asked)
        for name, value in {"loss": losses.loss, **losses.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value) * weight
        asked, first = asked + weight, first or moved
    return ({name: value / asked for name, value in sums.items()}, first) if asked else ({}, None)


def trimmed(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Text [B, L', E] and mask [B, L'] cut to the batch's longest caption: the same result for less work."""
    mask = batch["text_mask"]
    longest = max(1, int(mask.sum(1).max()))
    return batch["text"][:, :longest], mask[:, :longest]


@lru_cache(maxsize=1)
def _vae(path: str) -> VideoVAE:
    return load_vae(path)


def look(latents_BCthw: Tensor, vae_path: Path) -> np.ndarray:
    """Frames uint8 [B, T, H, W, 3] of normalised latents."""
    return to_frames(_vae(str(vae_path)).decode(latents_BCthw.cpu().float()))
