"""17-frame groups of pixels for training a VAE: decoded once, kept in a bounded cache, cropped at random.

Files that hold no usable video never end a training: they are left out, and named once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.nn import functional as F

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import GROUP_FRAMES, DataConfig, VideoConfig
from data_pipeline.footage import opened
from data_pipeline.schema import NO_VIDEO, TOO_SHORT, UNREADABLE, one_line
from data_pipeline.sources import VIDEO_SUFFIXES, find_videos
from data_pipeline.storage import base_name, parent

TOO_SMALL = "too small"
#: Frames that are read of one file, from its start: an hour of video must not fill the memory.
MOST_FRAMES = 600
PROBE_THREADS = 8
#: Files named in one line.
NAMED_FILES = 3


class PixelClips:
    """Random groups from inputs (folders, patterns, lists); each has a weight, however many videos it holds.

    Frames are kept at up to twice the target size, so that larger footage gives crops at varied scales.
    """

    def __init__(
        self, folders: Sequence[tuple[str | Path, float]], video: VideoConfig, data: DataConfig, held_out: int
    ) -> None:
        """Opens every file and leaves out, with one line a reason, those that do not fit.

        Raises ArtifactError if a folder has no usable video.
        """
        self.video, self.cache_bytes = video, data.cache_bytes
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._broken: set[str] = set()
        listed = _usable([_videos(folder, data) for folder, _ in folders], video)
        for (folder, _), paths in zip(folders, listed, strict=True):
            if not paths:
                raise ArtifactError(
                    f"{folder}: no video to train on; expected {', '.join(sorted(VIDEO_SUFFIXES))} of at least "
                    f"{GROUP_FRAMES} frames of {video.width}×{video.height}"
                )
        most = max(listed, key=len)
        by_hash = sorted(most, key=lambda p: hashlib.sha256(base_name(p).encode(errors="surrogateescape")).digest())
        self._held_out = by_hash[: min(held_out, len(by_hash) // 5)]
        kept_out = set(self._held_out)
        self._folders = [
            ([path for path in paths if path not in kept_out], weight)
            for (_, weight), paths in zip(folders, listed, strict=True)
        ]

    def training(self, seed: int, count: int) -> np.ndarray:
        """`count` groups drawn with `seed`: uint8 [count, 17, H, W, 3].

        Raises ArtifactError if every video of a folder has turned out to be broken.
        """
        rng = np.random.default_rng(seed)
        weights = np.array([weight for _, weight in self._folders])
        folders = rng.choice(len(self._folders), size=count, p=weights / weights.sum())
        return np.stack([self._group(self._folders[i][0], rng) for i in folders])

    def held_out(self, count: int) -> np.ndarray:
        """The first group of each of up to `count` videos that training never sees: uint8 [n, 17, H, W, 3].

        Empty where there are too few videos to keep any out.
        """
        rng = np.random.default_rng(0)
        read = (self._frames(path) for path in self._held_out[:count])
        groups = [self._cut(frames, rng, first=True) for frames in read if frames is not None]
        if not groups:
            return np.zeros((0, GROUP_FRAMES, self.video.height, self.video.width, 3), np.uint8)
        return np.stack(groups)

    def _group(self, paths: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        # a broken file stays in the list: what a seed draws must not depend on what was drawn before
        while True:
            frames = self._frames(paths[int(rng.integers(len(paths)))])
            if frames is not None:
                return self._cut(frames, rng, first=False)
            if self._broken.issuperset(paths):
                raise ArtifactError(f"{parent(paths[0])}: none of the {len(paths)} videos here can be read to its end")

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

    def _frames(self, path: str) -> np.ndarray | None:
        """The file's frames, or None, after one line about it, if it is broken."""
        if path in self._cache:
            self._cache.move_to_end(path)
            return self._cache[path]
        if path in self._broken:
            return None
        try:
            frames = _read(path, self.video)
        # a damaged file shows itself as one of many errors, depending on where the damage is
        except Exception as error:
            self._broken.add(path)
            _say(f"{path} left out: {one_line(error)}")
            return None
        self._cache[path] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return frames


def _videos(folder: str | Path, data: DataConfig) -> list[str]:
    return sorted(found.path for found in find_videos(folder, data) if found.path is not None)


def _usable(listed: Sequence[Sequence[str]], video: VideoConfig) -> list[list[str]]:
    """The files of each list that fit. Prints one line for each reason to leave files out."""
    left_out: dict[str, list[str]] = {}
    usable = []
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        for paths in listed:
            reasons = list(pool.map(lambda path: _unfit(path, video), paths))
            usable.append([path for path, reason in zip(paths, reasons, strict=True) if not reason])
            for path, reason in zip(paths, reasons, strict=True):
                if reason:
                    left_out.setdefault(reason, []).append(path)
    for reason, paths in left_out.items():
        names = [base_name(path) for path in paths[:NAMED_FILES]] + ["…"] * (len(paths) > NAMED_FILES)
        files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
        _say(f"{files} left out: {reason} ({one_line(', '.join(names))})")
    return usable


def _say(text: str) -> None:
    # names that are not UTF-8 reach Python with surrogates, which cannot be printed
    print("pixels: " + text.encode(errors="backslashreplace").decode(), flush=True)


def _unfit(path: str, video: VideoConfig) -> str:
    """Why the file cannot be used, by its header alone; empty if it can."""
    try:
        with opened(path) as container:
            if not container.streams.video:
                return NO_VIDEO
            stream = container.streams.video[0]
            frames = stream.frames or _estimated_frames(container.duration, stream.average_rate)
            if frames is not None and frames < GROUP_FRAMES:
                return TOO_SHORT
            context = stream.codec_context
            return TOO_SMALL if context.height < video.height or context.width < video.width else ""
    except Exception:
        return UNREADABLE


def _estimated_frames(duration: int | None, rate: object) -> int | None:
    """Frames by duration (microseconds) and rate; None where the header does not tell."""
    if not duration or not rate:
        return None
    return round(duration / 1e6 * float(rate))  # type: ignore[arg-type]


def _read(path: str, video: VideoConfig) -> np.ndarray:
    """The first MOST_FRAMES frames [T, H, W, 3], each group shrunk as soon as it is decoded.

    Raises ValueError if they do not fit, and what PyAV raises on damaged data.
    """
    parts: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    convert = VideoReformatter()  # a frame's own is set up anew for each
    with opened(path) as container:
        for number, frame in enumerate(container.decode(video=0), start=1):
            waiting.append(convert.reformat(frame, format="rgb24").to_ndarray())
            if len(waiting) == GROUP_FRAMES or number == MOST_FRAMES:
                parts.append(_shrink(np.stack(waiting), video))
                waiting = []
            if number == MOST_FRAMES:
                break
    if waiting:
        parts.append(_shrink(np.stack(waiting), video))
    count = sum(map(len, parts))
    if count < GROUP_FRAMES:
        raise ValueError(f"{count} frames could be decoded, expected at least {GROUP_FRAMES}")
    frames = np.concatenate(parts)
    if frames.shape[1] < video.height or frames.shape[2] < video.width:
        expected = f"expected at least {video.width}×{video.height}"
        raise ValueError(f"frames of {frames.shape[2]}×{frames.shape[1]}, {expected}")
    return frames


def _shrink(frames: np.ndarray, video: VideoConfig) -> np.ndarray:
    """Frames [T, H, W, 3] at the smallest size that covers twice the target (area averaging); never enlarged."""
    height, width = frames.shape[1:3]
    ratio = 2 * max(video.height / height, video.width / width)
    if ratio >= 1:
        return frames
    size = (round(height * ratio), round(width * ratio))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    return F.interpolate(pixels, size=size, mode="area").round().byte().permute(0, 2, 3, 1).numpy()
