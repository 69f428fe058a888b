"""Both readers show the frame of the moment, in every container, at every rate, upright, with square pixels in mind."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.footage import AvFootage, DecordFootage, Footage, check_video, open_footage, scan
from tests.data_pipeline.inputs import numbered, numbers_of

READERS = (DecordFootage, AvFootage)


def write(
    path: Path,
    frames: NDArray[np.uint8],
    codec: str = "libx264",
    *,
    pixels: str = "yuv420p",
    rotation: int = 0,
    pixel_aspect: Fraction | None = None,
    times_ms: list[int] | None = None,
) -> str:
    """A video of 25 frames a second, or with the times given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = pixels, 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times_ms:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixel_values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixel_values, format="rgb24")
            if times_ms:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def shown(footage: Footage, moments_s: NDArray[np.float64]) -> list[int]:
    """The numbers of the frames at some moments."""
    return numbers_of(np.stack(list(footage.frames_at(moments_s))))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "ffv1"),
        ("a.webm", "libvpx"),
        ("a.avi", "mpeg4"),
        ("a.flv", "libx264"),
        ("a.ts", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.wmv", "wmv2"),
    ],
)
def test_every_container_gives_the_frames_asked_for(tmp_path: Path, name: str, codec: str) -> None:
    path = write(tmp_path / name, numbered(80, 64, 64), codec)
    moments_s = (np.arange(34) + 0.5) / 25 + 0.8
    footage = open_footage(path)
    assert shown(footage, moments_s) == list(range(20, 54))
    assert shown(AvFootage(path, 1), moments_s) == list(range(20, 54))
    # decord is not asked where it would give other frames without an error
    assert isinstance(footage, AvFootage if name in {"a.ts", "a.mpg", "a.wmv"} else DecordFootage)
    assert footage.duration_s == pytest.approx(3.2, abs=0.13 if name == "a.flv" else 0.01)


@pytest.mark.parametrize("reader", READERS)
def test_variable_frame_rates_show_the_frame_of_the_moment(tmp_path: Path, reader: type[Footage]) -> None:
    times_ms = np.cumsum(np.random.default_rng(1).integers(20, 120, 60)).tolist()
    footage = reader(write(tmp_path / "a.mp4", numbered(60), times_ms=times_ms), 1)  # type: ignore[call-arg]
    starts_s = (np.array(times_ms) - times_ms[0]) / 1000
    moments_s = np.arange(0.507, starts_s[-1] + 0.02, 0.04)
    assert shown(footage, moments_s) == (np.searchsorted(starts_s, moments_s, side="right") - 1).tolist()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("pixels", ["yuv420p10le", "yuv422p10le", "yuv444p"])
def test_ten_bits_and_other_chroma(tmp_path: Path, reader: type[Footage], pixels: str) -> None:
    footage = reader(write(tmp_path / "a.mp4", numbered(20), pixels=pixels), 1)  # type: ignore[call-arg]
    assert shown(footage, (np.arange(20) + 0.5) / 25) == list(range(20))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("rotation", "corner"), [(90, "left"), (-90, "right"), (180, "bottom")])
def test_rotated_footage_is_upright(tmp_path: Path, reader: type[Footage], rotation: int, corner: str) -> None:
    frames = np.zeros((10, 32, 64, 3), np.uint8)
    frames[:, :16, :, 0] = 255  # the upper half is red
    footage = reader(write(tmp_path / "a.mp4", frames, rotation=rotation), 1)  # type: ignore[call-arg]
    assert footage.size == ((32, 64) if rotation == 180 else (64, 32))
    red = next(footage.frames_at(np.array([0.1])))[..., 0] > 127
    height, width = red.shape
    where = {"left": red[:, : width // 2], "right": red[:, width // 2 :], "bottom": red[height // 2 :]}[corner]
    assert where.mean() > 0.9 and red.mean() < 0.6


def test_pixels_that_are_not_square_count_in_the_shown_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", numbered(10, 32, 64), pixel_aspect=Fraction(2, 1))
    assert open_footage(path).size == AvFootage(path, 1).size == (32, 128)
    assert check_video(path) == ("mov,mp4,m4a,3gp,3g2,mj2", 2.0)


def test_odd_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", numbered(10, 33, 48)[:, :, :47], "ffv1", pixels="yuv444p")
    for footage in (open_footage(path), AvFootage(path, 1)):
        assert footage.size == (33, 47)
        assert next(footage.frames_at(np.array([0.0]))).shape == (33, 47, 3)


def test_a_file_that_ends_before_its_header_says_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 255, (80, 64, 64, 3), np.uint8), "ffv1")
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"decod|end|Invalid"):
        list(AvFootage(path, 1).frames_at((np.arange(60) + 0.5) / 25))


def test_a_scan_sees_every_frame_small(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", numbered(30, 64, 128))
    times_s, frames = zip(*scan(path, 32), strict=True)
    assert np.allclose(times_s, np.arange(30) / 25)
    assert {frame.shape for frame in frames} == {(16, 32, 3)}
    assert numbers_of(np.stack(frames)) == list(range(30))


def hour_long(path: Path) -> str:
    """An hour of 640×360 at 25 frames a second: one encoded minute, its packets repeated."""
    minute = path.with_name("minute.mp4")
    noise = np.random.default_rng(0).integers(0, 255, (25, 45, 80, 3), dtype=np.uint8)
    frames = np.repeat(np.repeat(noise, 8, 1), 8, 2)
    write(minute, frames[np.arange(1500) % 25])
    with av.open(str(minute)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number in range(60):
            source.seek(0)
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is None or packet.pts is None:
                    continue
                shift = number * int(60 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                target.mux(packet)
    return str(path)


@pytest.mark.slow
def test_an_hour_of_footage_stays_below_two_gib(tmp_path: Path) -> None:
    path = hour_long(tmp_path / "hour.mp4")
    Path(path).with_suffix(".txt").write_text("noise")
    # in a process of its own: peak memory is that of a worker that does nothing else
    code = f"""
import resource
from arlon_ray.config import DataConfig, FilterConfig, VideoConfig
from data_pipeline.clips import find_clips
from data_pipeline.decode import Decoder
from data_pipeline.sources import find_sources
(source,) = find_sources({str(path)!r})
video = VideoConfig(height=360, width=640, fps=24)
clips, rejects = find_clips(source, video, DataConfig(bucket_groups=(4,), max_clips_per_video=10_000))
decoder = Decoder(FilterConfig())
rows = [decoder(row) for row in clips[:: max(1, len(clips) // 6)]]
assert len(rows) >= 6 and not any(row["reason"] for row in rows), [row["error"] for row in rows]
print(len(clips), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr[-2000:]
    clips, gib = result.stdout.split()
    print(f"{clips} clips, {float(gib):.2f} GiB")
    assert int(clips) > 100 and float(gib) < 2
