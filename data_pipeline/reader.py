"""Batches for training: every one from one bucket, and a pure function of (seed, step, rank, world).

Legend: B samples of one worker, C latent channels, t × h × w latent grid, t' × h' × w' token grid, L text tokens,
D text width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arlon_ray.artifact import ArtifactError
from data_pipeline.dataset import GroupCache, LatentDataset

__all__ = ["BucketBatches", "LatentDataset"]

log = logging.getLogger(__name__)

Batch = dict[str, Any]


@dataclass(frozen=True)
class Epoch:
    """The order of one pass: `rows` by bucket, and for each step its bucket and which batch of it."""

    number: int
    rows: dict[str, NDArray[np.int64]]
    buckets: list[str]
    parts: list[int]


class BucketBatches:
    """Shuffled training batches and the held-out clips of a dataset."""

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        seed: int,
        held_out: int = 0,
        *,
        share: float = 1.0,
        latents: bool = True,
        cache_bytes: int = 512 * 2**20,
        window_groups: int = 16,
    ) -> None:
        """`batch_size`: samples of one step over all workers. `held_out`: clips kept out of training.

        `share`: of the other clips, how many are trained on; the clips of a smaller share are part of a larger one.

        Rows are shuffled within windows of `window_groups` row groups, which are themselves shuffled: a large set is
        read nearly in order, a small one is shuffled through and through. Without `latents` only text and tokens are
        read. Raises ArtifactError where no bucket has a batch.
        """
        self.dataset, self.batch_size, self.seed, self.window_groups = dataset, batch_size, seed, window_groups
        self._latents = latents
        self._cache = GroupCache(dataset, cache_bytes, latents)
        self._epoch: Epoch | None = None
        held = _held_out_ids(dataset, held_out)
        self._train: dict[str, NDArray[np.bool_]] = {}
        self._held: dict[str, NDArray[np.int64]] = {}
        for name, index in dataset.buckets.items():
            out = np.isin(index.clip_ids, held)
            self._held[name] = np.flatnonzero(out)
            self._train[name] = ~out & (_mixed(index.clip_ids * 3) / 2.0**64 < share if share < 1 else True)
        counts = {name: int(mask.sum()) for name, mask in self._train.items()}
        self.train_rows = sum(counts.values())
        small = {name: count for name, count in counts.items() if count < batch_size}
        listed = ", ".join(f"{name}: {count}" for name, count in small.items())
        if len(small) == len(counts):
            raise ArtifactError(
                f"dataset {dataset.folder}: no bucket has the {batch_size} clips of one batch after {held_out} were "
                f"held out ({listed}); add videos, or make the batch or the held-out part smaller"
            )
        if small:
            log.warning("left out of training, fewer clips than a batch of %d: %s", batch_size, listed)
        self._used = [name for name in counts if name not in small]
        self.steps_per_epoch = sum(counts[name] // batch_size for name in self._used)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Worker `rank`'s share of the batch of `step` (B = batch_size / world); all shares make up the same batch.

        `latents` float32 [B,C,t,h,w], `text` float32 [B,L,D], `text_mask` bool [B,L], `tokens_fine` and
        `tokens_coarse` int64 [B,t',h',w'] (where the dataset has tokens), `clip_id` int64 [B], `fps` float32 [B],
        `given_frames` int64 [B] (how many frames belong to an earlier caption), `caption` list of B.
        Raises ValueError if `world` does not divide the batch.
        """
        if self.batch_size % world or not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} workers: they must divide the batch of {self.batch_size} evenly")
        number, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = self._plan(number)
        bucket = self._epoch.buckets[position]
        share = self.batch_size // world
        first = self._epoch.parts[position] * self.batch_size + rank * share
        return self._gather(bucket, self._epoch.rows[bucket][first : first + share])

    def held_out_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out clips, bucket by bucket, always in the same order; the last batch of a bucket may be smaller."""
        for bucket, rows in self._held.items():
            for first in range(0, len(rows), batch_size):
                yield self._gather(bucket, rows[first : first + batch_size])

    def _plan(self, number: int) -> Epoch:
        random = np.random.default_rng([self.seed, number])
        rows = {bucket: self._shuffled(bucket, random) for bucket in self._used}
        labels = np.repeat(np.arange(len(self._used)), [len(rows[bucket]) // self.batch_size for bucket in self._used])
        labels = random.permutation(labels)
        parts = np.zeros(len(labels), np.int64)
        for label in range(len(self._used)):
            mine = labels == label
            parts[mine] = np.arange(mine.sum())
        return Epoch(number, rows, [self._used[label] for label in labels], parts.tolist())

    def _shuffled(self, bucket: str, random: np.random.Generator) -> NDArray[np.int64]:
        """The training rows of a bucket: row groups shuffled, then rows within windows of them."""
        starts = self.dataset.buckets[bucket].starts
        groups = random.permutation(len(starts) - 1)
        windows = []
        for first in range(0, len(groups), self.window_groups):
            chosen = groups[first : first + self.window_groups]
            rows = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in chosen])
            windows.append(random.permutation(rows[self._train[bucket][rows]]))
        return np.concatenate(windows)

    def _gather(self, bucket: str, rows: NDArray[np.int64]) -> Batch:
        starts = self.dataset.buckets[bucket].starts
        numbers = np.searchsorted(starts, rows, side="right") - 1
        places = [
            (self._cache.get(bucket, int(number)), int(row - starts[number]))
            for number, row in zip(numbers, rows, strict=True)
        ]
        manifest = self.dataset.manifest
        text = np.zeros((len(rows), manifest.text_max_tokens, manifest.text_dim), np.float32)
        mask = np.zeros(text.shape[:2], bool)
        for position, (group, row) in enumerate(places):
            length = len(group.texts[row])
            text[position, :length] = group.texts[row]
            mask[position, :length] = True
        batch: Batch = {
            "text": torch.from_numpy(text),
            "text_mask": torch.from_numpy(mask),
            "clip_id": torch.tensor([int(group.clip_ids[row]) for group, row in places], dtype=torch.int64),
            "fps": torch.tensor([float(group.fps[row]) for group, row in places], dtype=torch.float32),
            "given_frames": torch.tensor([int(group.given_frames[row]) for group, row in places], dtype=torch.int64),
            "caption": [group.captions[row] for group, row in places],
        }
        if self._latents:
            stacked = np.stack([group.latents[row] for group, row in places if group.latents is not None])
            batch["latents"] = torch.from_numpy(stacked.astype(np.float32))
        for name in places[0][0].tokens:
            tokens = np.stack([group.tokens[name][row] for group, row in places])
            batch[f"tokens_{name}"] = torch.from_numpy(tokens.astype(np.int64))
        return batch


def _held_out_ids(dataset: LatentDataset, count: int) -> NDArray[np.int64]:
    """The `count` clip ids whose hash is largest: the choice stays nearly the same when a dataset grows."""
    ids = np.concatenate([index.clip_ids for index in dataset.buckets.values()])
    if count >= len(ids):
        raise ArtifactError(f"dataset {dataset.folder}: {len(ids)} clips, {count} of them to be held out: none is left")
    return ids[np.argsort(_mixed(ids), kind="stable")][len(ids) - count :]


def _mixed(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """splitmix64: ids that count upwards are spread as well as hashes."""
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
