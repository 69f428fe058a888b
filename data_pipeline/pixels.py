"""17-frame groups of pixels for training a VAE: decoded once, kept in a bounded cache, cropped at random."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import GROUP_FRAMES, VideoConfig
from arlon_ray.generation.video import read_video

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


class PixelClips:
    """Random groups from folders of videos; each folder has a weight, however many videos it holds.

    Frames are kept at up to twice the target size, so that larger footage gives crops at varied scales.
    """

    def __init__(
        self, folders: Sequence[tuple[Path, float]], video: VideoConfig, held_out: int, cache_bytes: int
    ) -> None:
        """Raises ArtifactError if a folder has no video left for training."""
        self.video, self.cache_bytes = video, cache_bytes
        self._cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        listed = [(sorted(p for p in folder.rglob("*") if p.suffix in VIDEO_SUFFIXES), w) for folder, w in folders]
        most = max(range(len(listed)), key=lambda i: len(listed[i][0]))
        by_hash = sorted(listed[most][0], key=lambda p: hashlib.sha256(p.name.encode()).digest())
        self._held_out = by_hash[: min(held_out, len(by_hash) // 5)]
        kept_out = set(self._held_out)
        self._folders = [([p for p in paths if p not in kept_out], weight) for paths, weight in listed]
        for (folder, _), (paths, _) in zip(folders, self._folders, strict=True):
            if not paths:
                raise ArtifactError(f"{folder}: no video to train on ({', '.join(VIDEO_SUFFIXES)})")

    def training(self, seed: int, count: int) -> np.ndarray:
        """`count` groups drawn with `seed`: uint8 [count, 17, H, W, 3]."""
        rng = np.random.default_rng(seed)
        weights = np.array([weight for _, weight in self._folders])
        folders = rng.choice(len(self._folders), size=count, p=weights / weights.sum())
        return np.stack([self._group(self._folders[i][0], rng) for i in folders])

    def held_out(self, count: int) -> np.ndarray:
        """The first group of each of up to `count` videos that training never sees: uint8 [count, 17, H, W, 3]."""
        rng = np.random.default_rng(0)
        return np.stack([self._cut(self._frames(path), rng, first=True) for path in self._held_out[:count]])

    def _group(self, paths: Sequence[Path], rng: np.random.Generator) -> np.ndarray:
        return self._cut(self._frames(paths[int(rng.integers(len(paths)))]), rng, first=False)

    def _cut(self, frames: np.ndarray, rng: np.random.Generator, first: bool) -> np.ndarray:
        height, width = self.video.height, self.video.width
        start = 0 if first else rng.integers(len(frames) - GROUP_FRAMES + 1)
        group = frames[start : start + GROUP_FRAMES]
        largest = min(group.shape[1] // height, group.shape[2] // width)
        stride = 1 if first else int(rng.integers(1, largest + 1))
        top = rng.integers(group.shape[1] - stride * height + 1)
        left = rng.integers(group.shape[2] - stride * width + 1)
        crop = group[:, top : top + stride * height, left : left + stride * width]
        # area averaging: a crop at half the resolution without aliasing
        pooled = crop.reshape(GROUP_FRAMES, height, stride, width, stride, 3).mean((2, 4))
        return pooled.round().astype(np.uint8)

    def _frames(self, path: Path) -> np.ndarray:
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        frames = _shrink(read_video(path), 2 * min(self.video.height, self.video.width))
        too_small = frames.shape[1] < self.video.height or frames.shape[2] < self.video.width
        if len(frames) < GROUP_FRAMES or too_small:
            raise ArtifactError(
                f"{path}: {len(frames)} frames of {frames.shape[2]}×{frames.shape[1]}: "
                f"expected at least {GROUP_FRAMES} of {self.video.width}×{self.video.height}"
            )
        self._cache[path] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return frames


def _shrink(frames: np.ndarray, shortest: int) -> np.ndarray:
    """Frames [T, H, W, 3] whose shorter side is at most `shortest` (area averaging)."""
    height, width = frames.shape[1:3]
    if min(height, width) <= shortest:
        return frames
    ratio = shortest / min(height, width)
    size = (round(height * ratio), round(width * ratio))
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    return F.interpolate(video, size=size, mode="area").round().byte().permute(0, 2, 3, 1).numpy()
