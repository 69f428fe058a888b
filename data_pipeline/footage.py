"""One video file opened for reading frames by number: decord, or PyAV where decord is missing or cannot.

T frames, H × W pixels of the file.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Protocol

import av
import numpy as np
from numpy.typing import NDArray

from data_pipeline import schema


class FootageError(ValueError):
    """A file that holds no usable video. `reason` is one of the reasons of `schema`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Footage(Protocol):
    """`times_s` [T + 1]: where each frame starts, in seconds from the first; last, where the video ends."""

    times_s: NDArray[np.float64]

    def frames(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """[len(indices),H,W,3] RGB; `indices` are ascending, without repetition. Raises on damaged data."""
        ...


@cache
def _decord() -> ModuleType | None:
    """decord, quietened, or None where there is no wheel for this machine."""
    try:
        import decord
    except (ImportError, OSError):
        _notices["fallback"] = "decord is not installed: videos are read with PyAV, which is slower"
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord


_notices: dict[str, str] = {}


def fallback_notice() -> str:
    """What this process has to announce about PyAV having stood in for decord; empty if it has not."""
    return _notices.get("fallback", "")


def _note_fallback() -> None:
    _notices.setdefault("fallback", "decord cannot read some of the files: those are read with PyAV, which is slower")


class DecordFootage:
    """A file opened with decord, which keeps an index and seeks by frame."""

    def __init__(self, path: str, threads: int) -> None:
        decord = _decord()
        if decord is None:
            raise RuntimeError("decord is not installed")
        self._reader = decord.VideoReader(path, num_threads=threads)
        count = len(self._reader)
        if not count:
            raise RuntimeError("no frames")
        spans = np.asarray(self._reader.get_frame_timestamp(range(count)), np.float64)
        self.times_s = _with_end(spans[:, 0], float(spans[-1, 1]))

    def frames(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Footage`."""
        return self._reader.get_batch(indices.tolist()).asnumpy()


class AvFootage:
    """A file opened with PyAV: an index from its packets, then decoding from the key frame before the span."""

    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads
        with av.open(path) as container:
            stream = container.streams.video[0]
            base = stream.time_base or Fraction(1, 90000)
            packets = [
                (packet.pts, packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None
            ]
        if not packets:
            raise RuntimeError("no frames")
        packets.sort()
        self._pts = np.array([pts for pts, _ in packets], np.int64)
        last = packets[-1][1] or (int(np.median(np.diff(self._pts))) if len(packets) > 1 else 1)
        scale = float(base)
        self.times_s = _with_end(self._pts * scale, (int(self._pts[-1]) + last) * scale)

    def frames(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """See `Footage`."""
        wanted = {int(self._pts[index]) for index in indices}
        found: dict[int, NDArray[np.uint8]] = {}
        with av.open(self._path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = self._threads
            container.seek(min(wanted), stream=stream)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    found[frame.pts] = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                if frame.pts is not None and len(found) == len(wanted):
                    break
        missing = len(wanted) - len(found)
        if missing:
            raise RuntimeError(f"{missing} of {len(wanted)} frames could not be decoded")
        return np.stack([found[int(self._pts[index])] for index in indices])


def _with_end(starts_s: NDArray[np.floating], end_s: float) -> NDArray[np.float64]:
    return np.append(starts_s, max(end_s, float(starts_s[-1]))) - starts_s[0]


def check_video(path: str) -> None:
    """Raise FootageError unless the container opens and has a video stream. Reads the header only."""
    # PyAV says in one line what decord prints to stderr
    try:
        with av.open(path) as container:
            streams = len(container.streams.video)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise FootageError(schema.UNREADABLE, str(error)) from None
    if not streams:
        raise FootageError(schema.NO_VIDEO, "the container has no video stream")


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """A picture file (PNG, JPEG, …; the first frame of a video), [H,W,3] RGB. Raises FootageError."""
    check_video(str(path))
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    except (av.FFmpegError, OSError, ValueError, StopIteration) as error:
        raise FootageError(schema.UNREADABLE, f"no picture in it: {error}") from None


def open_footage(path: str, threads: int = 1) -> Footage:
    """Open `path` with decord, else PyAV. Raises FootageError if neither can."""
    check_video(path)
    try:
        return DecordFootage(path, threads)
    except Exception as error:  # decord raises RuntimeError and its own DECORDError, an Exception
        first = error
    try:
        footage = AvFootage(path, threads)
    except Exception as error:
        raise FootageError(schema.UNREADABLE, f"decord: {first}; PyAV: {error}") from None
    _note_fallback()
    return footage


def read_frames(path: str, footage: Footage, indices: NDArray[np.int64], threads: int = 1) -> NDArray[np.uint8]:
    """Frames `indices` of `footage`, which may repeat, [len(indices),H,W,3]; PyAV gets a second try.

    Raises whatever the last reader raised.
    """
    unique, positions = np.unique(indices, return_inverse=True)
    try:
        frames = footage.frames(unique)
    except Exception:
        if isinstance(footage, AvFootage):
            raise
        frames = AvFootage(path, threads).frames(unique)
        _note_fallback()
    return frames if len(unique) == len(indices) else frames[positions]
