"""Row function: a clip row → its frames, uint8 [T,H,W,3], at the size and rate asked for, and their scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from arlon_ray.config import FilterConfig
from data_pipeline import schema
from data_pipeline.footage import (
    CHUNK_FRAMES,
    AvFootage,
    Footage,
    FootageError,
    note_fallback,
    open_footage,
)
from data_pipeline.schema import SCORES, Row, one_line
from data_pipeline.scores import CLIP_THRESHOLDS, judge, measure


def fit(frames: NDArray[np.uint8], height: int, width: int, shown: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """[T,H,W,3] scaled, aspect kept, until it covers height × width, then cut to the centre.

    `shown`: (height, width) in square pixels, where the frames' own are not square.
    """
    old_height, old_width = shown or frames.shape[1:3]
    if frames.shape[1:3] == (old_height, old_width) == (height, width):
        return frames
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # on bytes torch interpolates twenty times as fast as on floats, and to the nearest level
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    scaled = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    cut = scaled[:, :, top : top + height, left : left + width]
    return cut.permute(0, 2, 3, 1).contiguous().numpy()


class Clip:
    """A whole video at another size and rate, read part by part: memory does not grow with its length."""

    def __init__(self, path: str, height: int, width: int, fps: float) -> None:
        """Raises FootageError if the file cannot be read, or is shorter than a frame."""
        self.path, self.size, self.fps = path, (height, width), fps
        self.frames = int(open_footage(path).duration_s * fps + 1e-6)
        if not self.frames:
            raise FootageError(schema.UNREADABLE, f"shorter than a frame at {fps:g} frames a second")

    def read(self, first: int, count: int) -> NDArray[np.uint8]:
        """Frames [count,H,W,3] from frame `first` on. Raises as `decode_clip` does."""
        row = {"uri": self.path, "start_s": first / self.fps, "num_frames": count, "fps": self.fps}
        return decode_clip({**row, "height": self.size[0], "width": self.size[1]})

    def parts(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """All frames, `count` at a time."""
        for first in range(0, self.frames, count):
            yield self.read(first, min(count, self.frames - first))


def moments_s(row: Row) -> NDArray[np.float64]:
    """The moments of a clip's frames, in seconds from the first frame of the file, [num_frames]."""
    # half a frame on: a time stamp that is rounded up must not show the frame before
    return np.asarray(row["start_s"] + (np.arange(row["num_frames"]) + 0.5) / row["fps"], np.float64)


def decode_clip(row: Row, threads: int = 1, footage: Footage | None = None) -> NDArray[np.uint8]:
    """The frames of a clip row, [T,H,W,3]; `footage`: its file, where that is open already.

    Raises FootageError or what the reader raises on damaged data.
    """
    footage = footage or open_footage(row["uri"], threads)
    height, width, moments = row["height"], row["width"], moments_s(row)
    try:
        return _fitted(footage, moments, height, width)
    except Exception:
        if isinstance(footage, AvFootage):
            raise
        frames = _fitted(AvFootage(row["uri"], threads), moments, height, width)
        note_fallback()
        return frames


def _fitted(footage: Footage, moments: NDArray[np.float64], height: int, width: int) -> NDArray[np.uint8]:
    """Frames [T,height,width,3]; a few at a time are held at the file's own size."""
    frames = footage.frames_at(moments)
    chunks = []
    while chunk := list(islice(frames, CHUNK_FRAMES)):
        chunks.append(fit(np.stack(chunk), height, width, footage.size))
    return np.concatenate(chunks)


class Decoder:
    """Row function: a clip row → a row of `schema.DECODED`. Keeps the last file open: the next clip is often of it."""

    def __init__(self, filters: FilterConfig, threads: int = 1) -> None:
        self.filters, self.threads = filters, threads
        cv2.setNumThreads(threads)
        self._uri = ""
        self._footage: Footage | None = None

    def __call__(self, row: Row) -> Row:
        """Never raises: an error becomes the row's reason."""
        try:
            frames = decode_clip(row, self.threads, self._open(row["uri"]))
        except Exception as error:
            self._uri = ""
            message = one_line(f"{type(error).__name__}: {error}")
            return _rejected(row, schema.STAGE_DECODE, schema.DECODE_FAILED, message, dict.fromkeys(SCORES.names))
        scores = measure(frames, row["fps"], text=self.filters.max_text is not None)
        reason, broken = judge({**row, **scores}, self.filters, CLIP_THRESHOLDS)
        if reason:
            return _rejected(row, schema.STAGE_FILTER, reason, broken, scores)
        return {**row, **scores, "frames": frames.tobytes(), "stage": "", "reason": "", "error": ""}

    def _open(self, uri: str) -> Footage:
        if self._footage is None or uri != self._uri:
            # the old one is let go first: an index of a long file is large
            self._footage = None
            self._footage, self._uri = open_footage(uri, self.threads), uri
        return self._footage


def _rejected(row: Row, stage: str, reason: str, error: str, scores: Row) -> Row:
    return {**row, **scores, "frames": b"", "stage": stage, "reason": reason, "error": error}


def decode_row(row: Row, threads: int = 1) -> Row:
    """A clip row → a row of `schema.DECODED`, without filters."""
    return Decoder(FilterConfig(), threads)(row)
