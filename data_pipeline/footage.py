"""One video file opened for reading frames by their time: decord, or PyAV where decord is missing or cannot.

decord keeps an index of the whole file and reads local files only. PyAV seeks to the span and decodes from there; it
reads files in buckets range by range. Frames come as they are meant to be shown: a rotation in the file is applied.
H × W pixels of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Protocol

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from data_pipeline import schema, storage

#: Frames that decord is asked for at once: what is held at the file's own size.
CHUNK_FRAMES = 17
#: Containers with an index: decord (0.6) finds the frames that it is asked for, and the header's duration is right. Of
#: MPEG streams and ASF it gives other frames, without an error.
INDEXED = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "flv"})
#: Slack, in seconds, for time stamps that are rounded (float32 in decord, milliseconds in Matroska).
SLACK_S = 1e-4
#: Seconds beyond the end of the last frame that could be decoded for which it may stand in; more, and data is missing.
END_S = 0.5


class FootageError(ValueError):
    """A file that holds no usable video. `reason` is one of the reasons of `schema`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Footage(Protocol):
    """An opened video. `duration_s`: from its first frame to its end. `size`: (height, width) as it is shown.

    The shown size has square pixels, `frames_at` gives the file's own: of anamorphic footage they differ.
    """

    @property
    def duration_s(self) -> float:
        """Seconds."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in square pixels."""
        ...

    def frames_at(self, moments_s: NDArray[np.float64]) -> Iterator[NDArray[np.uint8]]:
        """For each moment (seconds from the first frame, ascending) what is on screen, [H,W,3] RGB.

        A moment a little beyond the end shows the last frame. Raises on damaged data.
        """
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


def note_fallback() -> None:
    """Remember that PyAV stood in for decord."""
    _notices.setdefault("fallback", "decord cannot read some of the files: those are read with PyAV, which is slower")


class DecordFootage:
    """A local file opened with decord, which keeps an index and seeks by frame. decord itself applies rotations."""

    def __init__(self, path: str, threads: int, pixel_aspect: float = 1.0) -> None:
        decord = _decord()
        if decord is None:
            raise RuntimeError("decord is not installed")
        self._reader = decord.VideoReader(path, num_threads=threads)
        self._pixel_aspect = pixel_aspect
        count = len(self._reader)
        if not count:
            raise RuntimeError("no frames")
        spans = np.asarray(self._reader.get_frame_timestamp(range(count)), np.float64)
        self._starts_s = spans[:, 0] - spans[0, 0]
        self.duration_s = max(float(spans[-1, 1] - spans[0, 0]), float(self._starts_s[-1]))

    @cached_property
    def size(self) -> tuple[int, int]:
        """See `Footage`."""
        return _shown_size(self._reader[0].asnumpy(), self._pixel_aspect)

    def frames_at(self, moments_s: NDArray[np.float64]) -> Iterator[NDArray[np.uint8]]:
        """See `Footage`."""
        shown = np.searchsorted(self._starts_s, moments_s + SLACK_S, side="right") - 1
        shown = np.clip(shown, 0, len(self._starts_s) - 1)
        for first in range(0, len(shown), CHUNK_FRAMES):
            unique, positions = np.unique(shown[first : first + CHUNK_FRAMES], return_inverse=True)
            frames = self._reader.get_batch(unique.tolist()).asnumpy()
            yield from (frames[position] for position in positions)


class AvFootage:
    """A file, local or remote, read with PyAV: from the key frame before a span, without an index."""

    def __init__(self, location: str, threads: int) -> None:
        self._location, self._threads = location, threads
        with _container(location) as (container, stream):
            base = float(stream.time_base or Fraction(1, 90000))
            frame = next((frame for frame in container.decode(stream) if frame.pts is not None), None)
            if frame is None:
                raise RuntimeError("no frames")
            self._first_pts, self._base = int(frame.pts or 0), base
            picture = _upright(frame, VideoReformatter())
            self.size = _shown_size(picture, _pixel_aspect(stream))
            self._header_s = self._header_duration_s(container, stream)

    @cached_property
    def duration_s(self) -> float:
        """See `Footage`; where the header does not tell, by reading the whole file."""
        return self._header_s or self._packets_duration_s()

    def _header_duration_s(self, container: InputContainer, stream: VideoStream) -> float:
        if container.format.name not in INDEXED:
            return 0.0
        if stream.duration:
            return float(stream.duration - self._first_pts + (stream.start_time or 0)) * self._base
        # the container's own is that of its longest stream
        return container.duration / 1e6 if container.duration and len(container.streams) == 1 else 0.0

    def _packets_duration_s(self) -> float:
        with _container(self._location) as (container, stream):
            packets = sorted((p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None)
        last = packets[-1][1] or (int(np.median(np.diff([pts for pts, _ in packets]))) if len(packets) > 1 else 1)
        return float(packets[-1][0] + last - self._first_pts) * self._base

    def frames_at(self, moments_s: NDArray[np.float64]) -> Iterator[NDArray[np.uint8]]:
        """See `Footage`."""
        number, convert = 0, VideoReformatter()
        for ends_s, frame in self._frames_from(float(moments_s[0])):
            shown: NDArray[np.uint8] | None = None
            while number < len(moments_s) and moments_s[number] + SLACK_S < ends_s:
                shown = _upright(frame, convert) if shown is None else shown
                yield shown
                number += 1
            if number == len(moments_s):
                return
        raise RuntimeError(f"decoding ended before {moments_s[number]:.2f} s")

    def _frames_from(self, moment_s: float) -> Iterator[tuple[float, av.VideoFrame]]:
        """(ends at, frame) from the one shown at a moment on, or from a little before."""
        for place in (moment_s, 0.0):
            with _container(self._location) as (container, stream):
                stream.codec_context.thread_count = self._threads
                if place:
                    container.seek(self._first_pts + int(place / self._base), stream=stream)
                before: tuple[float, av.VideoFrame] | None = None
                for frame in container.decode(stream):
                    if frame.pts is None:
                        continue
                    if frame.is_corrupt:
                        raise RuntimeError(f"damaged frame at {frame.time} s")
                    starts_s = (frame.pts - self._first_pts) * self._base
                    if before is None and place and starts_s > moment_s + SLACK_S:
                        break  # the seek went too far, as in files whose key frames are marked wrongly
                    if before is not None:
                        yield starts_s, before[1]
                    before = starts_s, frame
                else:
                    if before is None:
                        raise RuntimeError(f"no frame could be decoded from {moment_s:.2f} s on")
                    shown_s = (before[1].duration or 0) * self._base
                    yield before[0] + shown_s + END_S if shown_s else float("inf"), before[1]
                    return


def scan(location: str, side: int, threads: int = 1) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """Every frame of a file in order: (seconds from the first, RGB [h,w,3] of at most `side` pixels)."""
    first: int | None = None
    convert = VideoReformatter()
    with _container(location) as (container, stream):
        stream.codec_context.thread_count = threads
        base = float(stream.time_base or Fraction(1, 90000))
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            first = frame.pts if first is None else first
            scale = min(1.0, side / max(frame.height, frame.width))
            width, height = max(2, round(frame.width * scale)), max(2, round(frame.height * scale))
            small = convert.reformat(frame, width, height, "rgb24").to_ndarray()
            yield (frame.pts - first) * base, small.astype(np.uint8, copy=False)


@contextmanager
def _container(location: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file's container and its first video stream."""
    with opened(location) as container:
        yield container, container.streams.video[0]


@contextmanager
def opened(location: str) -> Iterator[InputContainer]:
    """A file, local or remote, opened with PyAV. Raises av.FFmpegError or OSError."""
    if not storage.is_remote(location):
        with av.open(location) as container:
            yield container
        return
    with (
        closing(storage.open_input(location)) as file,
        av.open(file, "r", buffer_size=storage.REQUEST_BYTES) as container,
    ):
        yield container


def _upright(frame: av.VideoFrame, convert: VideoReformatter) -> NDArray[np.uint8]:
    """[H,W,3] RGB with the file's rotation applied. `convert`: one for many frames; one's own is set up for each."""
    picture = convert.reformat(frame, format="rgb24").to_ndarray().astype(np.uint8, copy=False)
    turns = round(frame.rotation / 90) % 4
    return np.rot90(picture, turns) if turns else picture


def _shown_size(picture: NDArray[np.uint8], pixel_aspect: float) -> tuple[int, int]:
    return picture.shape[0], max(1, round(picture.shape[1] * pixel_aspect))


def _pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height."""
    ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    return float(ratio) if ratio else 1.0


def check_video(location: str) -> tuple[str, float]:
    """(container format, the pixels' width over their height), by the header alone.

    Raises FootageError unless the container opens and has a video stream.
    """
    # PyAV says in one line what decord prints to stderr
    try:
        with opened(location) as container:
            if not container.streams.video:
                raise FootageError(schema.NO_VIDEO, "the container has no video stream")
            return container.format.name, _pixel_aspect(container.streams.video[0])
    except FootageError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise FootageError(schema.UNREADABLE, str(error)) from None


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """A picture file (PNG, JPEG, …; the first frame of a video), [H,W,3] RGB. Raises FootageError."""
    check_video(str(path))
    try:
        with av.open(str(path)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    except (av.FFmpegError, OSError, ValueError, StopIteration) as error:
        raise FootageError(schema.UNREADABLE, f"no picture in it: {error}") from None


def open_footage(location: str, threads: int = 1) -> Footage:
    """Open a local file with decord, else PyAV; a remote one with PyAV. Raises FootageError if it cannot be."""
    container, pixel_aspect = check_video(location)
    first: Exception | None = None
    if not storage.is_remote(location) and container in INDEXED:
        try:
            return DecordFootage(location, threads, pixel_aspect)
        except Exception as error:  # decord raises RuntimeError and its own DECORDError, an Exception
            first = error
    try:
        footage = AvFootage(location, threads)
    except Exception as error:
        tried = f"decord: {first}; PyAV: {error}" if first else str(error)
        raise FootageError(schema.UNREADABLE, tried) from None
    if first is not None:
        note_fallback()
    return footage
