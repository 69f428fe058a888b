"""Video files: exact frame counts over joins, time stamps, quality, atomicity."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.generation.video import (
    FragmentStream,
    GrowingVideo,
    contact_sheet,
    encode_fragment,
    join_fragments,
    read_video,
    write_video,
)

av = pytest.importorskip("av")


def moving_square(count: int, start: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A saturated square that moves over a gradient: [count, height, width, 3]."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(40, 200, width).astype(np.uint8)
    frames[..., 2] = np.linspace(60, 180, height).astype(np.uint8)[:, None]
    for index in range(count):
        left = (2 * (index + start)) % (width - 16)
        frames[index, 16:32, left : left + 16] = (220, 30, 40)
    return frames


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error))


def time_stamps(path: Path) -> list[float]:
    with av.open(str(path)) as opened:
        return [float(frame.pts * frame.time_base) for frame in opened.decode(video=0)]


@pytest.mark.parametrize("fps", [16.0, 23.976, 30.0])
def test_joined_fragments_keep_every_frame_in_order(tmp_path: Path, fps: float) -> None:
    counts = [34, 17, 17, 1, 51]
    starts = np.cumsum([0, *counts[:-1]])
    parts = [moving_square(count, start) for count, start in zip(counts, starts, strict=True)]
    fragments: list[bytes | Path] = [encode_fragment(part, fps) for part in parts]
    on_disk = tmp_path / "second.mp4"
    on_disk.write_bytes(bytes(fragments[1]))  # paths and bytes may be mixed
    fragments[1] = on_disk

    path = join_fragments(iter(fragments), tmp_path / "out" / "joined.mp4")

    frames, source = read_video(path), np.concatenate(parts)
    assert frames.shape == source.shape
    assert psnr(frames, source) > 30
    # a swapped or repeated frame would be far off in at least one place
    assert min(psnr(frame, wanted) for frame, wanted in zip(frames, source, strict=True)) > 28
    stamps = time_stamps(path)
    assert stamps[0] == 0
    assert np.allclose(np.diff(stamps), 1 / fps, rtol=1e-3)
    with av.open(str(path)) as opened:
        assert opened.streams.video[0].frames == sum(counts)
        assert float(opened.duration / av.time_base) == pytest.approx(sum(counts) / fps, rel=1e-3)


def test_joining_does_not_encode_again(tmp_path: Path) -> None:
    fragment = encode_fragment(moving_square(17), 16)
    path = join_fragments([fragment, fragment], tmp_path / "twice.mp4")
    alone, joined = read_video(io.BytesIO(fragment)), read_video(path)
    assert np.array_equal(joined[:17], alone)
    assert np.array_equal(joined[17:], alone)


def test_decord_reads_the_same_pictures(tmp_path: Path) -> None:
    decord = pytest.importorskip("decord")
    source = np.concatenate([moving_square(34), moving_square(17, 34)])
    path = join_fragments([encode_fragment(source[:34], 16), encode_fragment(source[34:], 16)], tmp_path / "a.mp4")
    reader = decord.VideoReader(str(path), num_threads=1)
    assert len(reader) == 51
    assert reader.get_avg_fps() == pytest.approx(16)
    assert psnr(reader.get_batch(range(51)).asnumpy(), source) > 30


def test_colours_survive_and_are_tagged(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 30)]
    source = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in colours])
    path = write_video(tmp_path / "colours.mp4", source, 16)
    assert np.abs(read_video(path).astype(int) - source).max() <= 6
    with av.open(str(path)) as opened:
        context = opened.streams.video[0].codec_context
        assert (int(context.colorspace), int(context.color_range)) == (1, 1)


def test_same_frames_same_bytes() -> None:
    assert encode_fragment(moving_square(17), 16) == encode_fragment(moving_square(17), 16)


def test_bytes_do_not_depend_on_what_is_left_in_memory() -> None:
    """glibc fills what it hands out with the byte asked for: what reads it before writing it is found out."""
    code = """
import hashlib, numpy
from arlon_ray.generation.video import encode_fragment
for size in (16, 16), (96, 96), (240, 426):
    frames = numpy.random.default_rng(0).integers(0, 256, (9, *size, 3), numpy.uint8).repeat(2, 0)
    print(size, hashlib.sha256(encode_fragment(frames, 12)).hexdigest())
"""
    first, *others = (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "MALLOC_PERTURB_": byte},
            capture_output=True, text=True, check=True,
        ).stdout
        for byte in ("0", "85", "255")
    )  # fmt: skip
    assert "(240, 426)" in first and others == [first, first]


def test_write_video_takes_a_generator(tmp_path: Path) -> None:
    source = moving_square(40)
    path = write_video(tmp_path / "video.mp4", (frame for frame in source), 16)
    assert psnr(read_video(path), source) > 30
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((4, 15, 16, 3), np.uint8), "16x15"),
        (np.zeros((0, 16, 16, 3), np.uint8), "no frames"),
        (np.zeros((4, 16, 16), np.uint8), "uint8"),
        (np.zeros((4, 16, 16, 3), np.float32), "float32"),
    ],
)
def test_bad_frames_are_refused(frames: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_fragment(frames, 16)


def test_failed_writes_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"earlier")
    good = encode_fragment(moving_square(17), 16)
    with pytest.raises(ValueError, match="fragment 1"):
        join_fragments([good, encode_fragment(moving_square(17, width=32), 16)], path)
    with pytest.raises(ValueError, match="no fragments"):
        join_fragments([], path)
    with pytest.raises(ValueError, match="no frames"):
        write_video(path, iter(()), 16)
    assert path.read_bytes() == b"earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]


def test_a_growing_video_can_be_watched_at_every_moment(tmp_path: Path) -> None:
    source = moving_square(68)
    parts = [source[:34], source[34:51], source[51:]]
    video = GrowingVideo(tmp_path / "video.mp4")
    for number, part in enumerate(parts, start=1):
        video.add(encode_fragment(part, 16))
        seen = read_video(video.partial)
        assert len(seen) == video.frames == sum(map(len, parts[:number])) and video.fragments == number
        assert np.array_equal(
            seen, np.concatenate([read_video(io.BytesIO(encode_fragment(p, 16))) for p in parts[:number]])
        )
    assert not (tmp_path / "video.mp4").exists()
    path = video.finish()
    assert np.array_equal(read_video(path), seen) and [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
    joined = join_fragments([encode_fragment(part, 16) for part in parts], tmp_path / "joined.mp4")
    with av.open(str(path)) as ours, av.open(str(joined)) as theirs:
        assert ours.duration == theirs.duration and ours.streams.video[0].average_rate == 16


def test_parts_of_a_stream_are_numbered_and_timed() -> None:
    stream, source = FragmentStream(), moving_square(51)
    parts = [stream.part(encode_fragment(source[:34], 24)), stream.part(encode_fragment(source[34:], 24))]
    assert [part.frames for part in parts] == [34, 17]
    assert parts[0].data[4:8] == b"ftyp" and parts[1].data[4:8] == b"moof" and b"mfra" not in parts[1].data
    with av.open(io.BytesIO(b"".join(part.data for part in parts))) as opened:
        times = [frame.time for frame in opened.decode(video=0)]
    assert times == pytest.approx([number / 24 for number in range(51)], abs=1e-3)
    with pytest.raises(ValueError, match="fragment 2 was not encoded like the first"):
        stream.part(encode_fragment(moving_square(17, width=32), 24))


def test_what_cannot_be_added_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = GrowingVideo(tmp_path / "video.mp4")
    video.add(encode_fragment(moving_square(34), 16))
    before = video.partial.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 300, limit[1]))  # as where the disk is full
    try:
        with pytest.raises(OSError):
            video.add(encode_fragment(moving_square(17), 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert video.partial.read_bytes() == before and video.frames == 34
    video.add(encode_fragment(moving_square(17), 16))
    assert len(read_video(video.finish())) == 51
    with pytest.raises(ValueError, match="no fragments"):
        GrowingVideo(tmp_path / "none.mp4").finish()


def test_contact_sheet_lays_frames_out_in_reading_order(tmp_path: Path) -> None:
    frames = np.stack([np.full((3, 5, 3), 10 * (index + 1), np.uint8) for index in range(5)])
    sheet = read_video(contact_sheet(tmp_path / "sheet.png", frames, columns=3))[0]
    assert sheet.shape == (6, 15, 3)
    assert [sheet[1, column].tolist() for column in (2, 7, 12)] == [[10] * 3, [20] * 3, [30] * 3]
    assert [sheet[4, column].tolist() for column in (2, 7, 12)] == [[40] * 3, [50] * 3, [0] * 3]


def test_contact_sheet_thins_out_long_videos(tmp_path: Path) -> None:
    frames = np.stack([np.full((2, 2, 3), index, np.uint8) for index in range(200)])
    sheet = read_video(contact_sheet(tmp_path / "sheet.png", frames, columns=4, limit=8))[0]
    assert sheet.shape == (4, 8, 3)
    assert (sheet[0, 0, 0], sheet[-1, -1, 0]) == (0, 199)
