"""Video files: H.264 in mp4, written in fragments that are joined without encoding again; contact sheets as PNG.

Frames are uint8 RGB [T, H, W, 3]. PyAV is imported where it is used: it is not part of what importing arlon_ray needs.
"""

from __future__ import annotations

import io
import math
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]

#: No B frames: decoding order is display order, so fragments can be put one after the other by an offset alone.
#: No macroblock tree: it reads memory that nobody has written, and equal pictures became different files. Without it
#: files are up to a third larger.
_X264 = {"crf": "16", "preset": "veryfast", "bf": "0", "x264-params": "open-gop=0:mbtree=0"}
_KEYFRAME_EVERY_S = 2.0
_FASTSTART = {"movflags": "faststart"}  # the index first: players start before the file is loaded
#: Parts of a file that is never whole: headers without an index, then frames with their own times.
_FRAGMENTED = {
    "movflags": "empty_moov+default_base_moof+frag_keyframe+frag_discont",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}
_BT709 = 1  # the same number in ffmpeg's colour space, primaries and transfer enumerations
_LIMITED_RANGE = 1


def encode_fragment(frames: Frames, fps: float) -> bytes:
    """Encode frames [T, H, W, 3] as an mp4 of its own (closed GOP, starts with a key frame). Same frames, same bytes.

    Raises ValueError for anything but uint8 RGB, for no frames, and for odd sizes (4:2:0 halves both).
    """
    _check_frames(frames)
    buffer = io.BytesIO()
    _encode(buffer, frames, fps)
    return buffer.getvalue()


def write_video(path: str | Path, frames: Iterable[Frames], fps: float) -> Path:
    """Write frames — [T, H, W, 3], or any iterable of frames [H, W, 3] — to an mp4 that appears whole or not at all.

    Keeps one frame at a time in memory. Raises ValueError as `encode_fragment` does.
    """
    with whole_file(path) as partial, partial.open("wb") as file:
        _encode(file, frames, fps, _FASTSTART)
    return Path(path)


def join_fragments(fragments: Iterable[bytes | str | Path], path: str | Path) -> Path:
    """Put fragments of `encode_fragment` one after the other into one mp4, which appears whole or not at all.

    Packets are copied with shifted time stamps, never encoded again; one fragment at a time is open. Raises ValueError
    for no fragments and for fragments that were not encoded alike.
    """
    import av

    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4", options=_FASTSTART) as output:
        target: Any = None
        first: tuple[Any, ...] = ()
        offset = 0
        for number, fragment in enumerate(fragments):
            source = io.BytesIO(fragment) if isinstance(fragment, bytes) else str(fragment)
            with av.open(source) as opened:
                stream = opened.streams.video[0]
                if target is None:
                    first = _layout(stream)
                    target = output.add_stream_from_template(stream)
                elif _layout(stream) != first:
                    raise ValueError(f"fragment {number} was not encoded like the first one: they cannot be joined")
                offset = _copy_packets(opened, stream, output, target, offset)
        if target is None:
            raise ValueError("no fragments to join")
    return Path(path)


class GrowingVideo:
    """An mp4 that can be watched while it grows, in `NAME.partial.mp4`, and becomes NAME.mp4 when it is finished.

    Each fragment is on the disk, whole and playable, when `add` returns. Raises OSError where the disk is full: what
    was added before stays there, and can still be played.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self.frames, self.fragments = 0, 0
        self._stream = FragmentStream()

    def add(self, fragment: bytes) -> None:
        """One of `encode_fragment`, behind those before."""
        part = self._stream.part(fragment)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = self.partial.stat().st_size if self.fragments else 0
        try:
            with self.partial.open("ab" if self.fragments else "wb") as file:
                file.write(part.data)
        except OSError:
            os.truncate(self.partial, size)
            raise
        self.fragments, self.frames = self.fragments + 1, self.frames + part.frames

    def finish(self) -> Path:
        """Put the index first and give the file its name. Raises ValueError if nothing was added."""
        if not self.fragments:
            raise ValueError("no fragments to join")
        join_fragments([self.partial], self.path)
        self.partial.unlink()
        return self.path


@dataclass(frozen=True)
class StreamPart:
    """Bytes of a fragmented mp4, and the frames in them."""

    data: bytes
    frames: int


class FragmentStream:
    """Turns fragments of `encode_fragment` into the parts of one fragmented mp4 (ISO/IEC 14496-12, `moof`).

    All parts, one behind the other, are a file, or what a browser plays while it arrives. The first begins with the
    headers, the others are frames alone.
    """

    def __init__(self) -> None:
        self._first: tuple[Any, ...] = ()
        self._offset, self._number, self._written = 0, 0, 0  # ticks, fragments, boxes of frames

    def part(self, fragment: bytes) -> StreamPart:
        """The next part. Raises ValueError if the fragment was not encoded like the first."""
        import av

        buffer = io.BytesIO()
        options = {**_FRAGMENTED, "fragment_index": str(self._written + 1)}
        with (
            av.open(io.BytesIO(fragment)) as opened,
            av.open(buffer, "w", format="mp4", options=options) as output,
        ):
            stream: Any = opened.streams.video[0]
            layout = _layout(stream)
            if self._number and layout != self._first:
                raise ValueError(f"fragment {self._number} was not encoded like the first one: they cannot be joined")
            target = output.add_stream_from_template(stream)
            ticks = _ticks(stream)
            end = _copy_packets(opened, stream, output, target, self._offset)
        kept = (b"moof", b"mdat") if self._number else (b"ftyp", b"moov", b"moof", b"mdat")
        boxes = [(kind, box) for kind, box in _boxes(buffer.getvalue()) if kind in kept]
        frames, self._offset = (end - self._offset) // ticks, end
        self._first, self._number = layout, self._number + 1
        self._written += sum(kind == b"moof" for kind, _ in boxes)
        return StreamPart(b"".join(box for _, box in boxes), frames)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, bytes) of each box at the top of an mp4."""
    start = 0
    while start < len(data):
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 16 if size == 1 else 8
        size = struct.unpack_from(">Q", data, start + 8)[0] if size == 1 else size or len(data) - start
        if size < header:
            raise ValueError(f"a box of {size} bytes at {start}: not an mp4")
        yield kind, data[start : start + size]
        start += size


def read_video(path: str | Path | IO[bytes]) -> Frames:
    """All frames of a video as uint8 [T, H, W, 3]. Meant for short ones: everything is in memory."""
    import av

    opened: Any = av.open(path if hasattr(path, "read") else str(path))
    with opened:
        return np.stack(list(as_rgb(opened.decode(video=0))))


def as_rgb(frames: Iterable[Any]) -> Iterator[Frames]:
    """Each of PyAV's frames as uint8 [H, W, 3].

    By one converter: a frame's own is set up anew for each, which takes longer than what it does.
    """
    from av.video.reformatter import VideoReformatter

    convert = VideoReformatter()
    for frame in frames:
        yield convert.reformat(frame, format="rgb24").to_ndarray().astype(np.uint8, copy=False)


def contact_sheet(path: str | Path, frames: Frames, columns: int = 8, limit: int = 64) -> Path:
    """Write frames [T, H, W, 3] as one PNG, in reading order; more than `limit` are thinned out evenly."""
    _check_frames(frames, even=False)
    if columns < 1 or limit < 1:
        raise ValueError(f"columns={columns} and limit={limit} must be at least 1")
    shown = frames if len(frames) <= limit else frames[np.linspace(0, len(frames) - 1, limit).round().astype(int)]
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    count, height, width, _ = shown.shape
    cells = np.zeros((rows * columns, height, width, 3), np.uint8)
    cells[:count] = shown
    sheet = cells.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    with whole_file(path) as partial:
        partial.write_bytes(_png(sheet))
    return Path(path)


def _encode(file: IO[bytes], frames: Iterable[Frames], fps: float, options: dict[str, str] | None = None) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    if not fps > 0:
        raise ValueError(f"fps={fps} must be above 0")
    rate, convert = Fraction(fps).limit_denominator(1001), VideoReformatter()
    with av.open(file, "w", format="mp4", options=options or {}) as output:
        stream: Any = None
        for index, picture in enumerate(frames):
            if stream is None:
                _check_frames(picture[None])
                stream = _video_stream(output, rate, picture.shape[1], picture.shape[0])
            frame = convert.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = index, 1 / rate
            output.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("no frames to encode")
        output.mux(stream.encode(None))


def _video_stream(output: Any, rate: Fraction, width: int, height: int) -> Any:
    options = {**_X264, "g": str(max(1, round(_KEYFRAME_EVERY_S * float(rate))))}
    stream = output.add_stream("libx264", rate=rate, options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    # untagged video is read as BT.601 or BT.709 according to its size, differently by different players
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    # the number of threads changes the bits, and with it the machine would
    context.thread_count = 1
    return stream


def _copy_packets(opened: Any, stream: Any, output: Any, target: Any, offset: int) -> int:
    """Copy all packets of `stream`, shifted by `offset` ticks; returns where the next fragment starts."""
    ticks = _ticks(stream)
    packets = 0
    for packet in opened.demux(stream):
        if packet.dts is None:  # the demuxer's flushing packet, which holds nothing
            continue
        packet.stream = target
        packet.pts = packet.dts = offset + packets * ticks
        packet.duration = ticks
        packets += 1
        output.mux(packet)
    return offset + packets * ticks


def _ticks(stream: Any) -> int:
    """Of a frame, in the stream's time base."""
    return int(1 / (stream.average_rate * stream.time_base))


def _layout(stream: Any) -> tuple[Any, ...]:
    """What must be equal for packets of two streams to follow each other."""
    context = stream.codec_context
    return (
        context.name,
        context.width,
        context.height,
        bytes(context.extradata or b""),
        stream.average_rate,
        stream.time_base,
    )


def _check_frames(frames: Frames, *, even: bool = True) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}")
    if not frames.size:
        raise ValueError("no frames to encode")
    if even and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise ValueError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}: width and height must be even for 4:2:0 H.264"
        )


def _png(picture: Frames) -> bytes:
    """An 8-bit RGB PNG of [H, W, 3], written by hand: no imaging library is needed for so little."""
    height, width, _ = picture.shape
    lines = np.zeros((height, 1 + width * 3), np.uint8)  # every line starts with its filter, 0: none
    lines[:, 1:] = picture.reshape(height, width * 3)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place when the block ends, and vanishes if it raises."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
