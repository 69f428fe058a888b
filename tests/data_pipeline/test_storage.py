"""Videos in a bucket: a real S3 server, started here, read range by range."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pytest

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import DataConfig, VideoConfig
from data_pipeline import storage
from data_pipeline.clips import find_clips
from data_pipeline.decode import decode_clip
from data_pipeline.footage import AvFootage, open_footage
from data_pipeline.pixels import PixelClips
from data_pipeline.sources import find_sources
from jobs.command_line import InputError, collection
from tests.data_pipeline.inputs import numbered, numbers_of, write_video
from tests.s3 import client_with, s3_server

VIDEO = VideoConfig(height=32, width=32, fps=16)
NAMES = ["a/one.mp4", "a/b/tw o.mp4", "thré%e.mp4"]


@pytest.fixture(scope="module")
def options() -> Iterator[str]:
    """The part of a URI that names the server; keys are in the environment."""
    with s3_server("footage") as named:
        yield named


@pytest.fixture(scope="module")
def client(options: str) -> Any:
    """A client of the server, to put files there."""
    return client_with(options)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same collection on the disk."""
    folder = tmp_path_factory.mktemp("videos")
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, numbered(68 + number))
        (folder / name).with_suffix(".txt").write_text(f"a ramp, {number}")
    (folder / "a" / ".hidden.mp4").write_bytes(b"x")
    (folder / "empty.mp4").write_bytes(b"")
    rows = {"path": [NAMES[1], NAMES[0]], "caption": ["from the list", ""]}
    pyarrow.csv.write_csv(pyarrow.table(rows), folder / "list.csv")
    return folder


@pytest.fixture(scope="module")
def bucket(client: Any, local: Path) -> str:
    """The collection in the bucket; the URI without options."""
    for path in local.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "footage", f"set/{path.relative_to(local).as_posix()}")
    return "s3://footage/set"


def test_a_bucket_holds_the_same_clips_as_the_folder(bucket: str, options: str, local: Path) -> None:
    here, there = find_sources(local), find_sources(bucket + options)
    facts = [[(s.name, s.size, s.identity, s.caption) for s in sources] for sources in (here, there)]
    assert facts[0] == facts[1] and [name for name, *_ in facts[0]] == sorted([*NAMES, "empty.mp4"])
    data = DataConfig(bucket_groups=(2,))
    for ours, theirs in zip(here, there, strict=True):
        clips, rejects = find_clips(theirs, VIDEO, data)
        expected = find_clips(ours, VIDEO, data)
        assert [row["clip_id"] for row in clips] == [row["clip_id"] for row in expected[0]]
        assert rejects == expected[1]
        for row, first in zip(clips, (0, 34), strict=False):
            assert numbers_of(decode_clip(row)) == list(range(first, first + 34))


def test_patterns_lists_and_single_files(bucket: str, options: str) -> None:
    assert [s.name for s in find_sources(f"{bucket}/**/*.mp4{options}")] == sorted([*NAMES, "empty.mp4"])
    assert [s.name for s in find_sources(f"{bucket}/a/*.mp4{options}")] == ["one.mp4"]
    listed = find_sources(f"{bucket}/list.csv{options}")
    assert [(s.name, s.caption.said) for s in listed] == [(NAMES[1], "from the list"), (NAMES[0], "a ramp, 0")]
    assert storage.is_file(listed[0].path)
    (single,) = find_sources(storage.child(f"{bucket}/{options}", NAMES[2]))
    assert (single.name, single.caption.said) == (NAMES[2], "a ramp, 2")


def test_a_list_here_may_name_videos_there(bucket: str, options: str, tmp_path: Path) -> None:
    location = f"{bucket}/a/one.mp4{options}"
    pyarrow.csv.write_csv(pyarrow.table({"path": [location], "caption": ["ours"]}), tmp_path / "list.csv")
    (source,) = find_sources(tmp_path / "list.csv")
    assert (source.path, source.caption.said, source.error) == (location, "ours", "")


def test_a_span_is_read_without_the_rest(
    bucket: str, options: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 96, 96, 3), dtype=np.uint8)
    write_video(tmp_path / "long.mp4", noise, g="20")
    client.upload_file(str(tmp_path / "long.mp4"), "footage", "long.mp4")
    size = (tmp_path / "long.mp4").stat().st_size
    read = 0
    opened = storage.open_input

    class Counting:
        def __init__(self, location: str) -> None:
            self.file = opened(location)

        def read(self, count: int) -> bytes:
            nonlocal read
            found = self.file.read(count)
            read += len(found)
            return found

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    monkeypatch.setattr(storage, "open_input", Counting)
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1 << 16)
    footage = open_footage(f"s3://footage/long.mp4{options}")
    assert isinstance(footage, AvFootage) and footage.duration_s == pytest.approx(25)
    frames = list(footage.frames_at((np.arange(17) + 0.5) / 16 + 12))
    assert len(frames) == 17
    # the header twice (check and open), the first frame, then the span: 1 of 25 seconds, between key frames
    assert read < 0.25 * size


def test_training_a_vae_reads_a_bucket(bucket: str, options: str) -> None:
    clips = PixelClips([(f"{bucket}/a{options}", 1.0)], VIDEO, DataConfig(), held_out=0)
    assert clips.training(0, 2).shape == (2, 17, 32, 32, 3)


def test_what_is_not_there_is_refused(bucket: str, options: str) -> None:
    with pytest.raises(InputError, match=r"--input s3://footage/nothing.*: not found"):
        collection(f"s3://footage/nothing{options}", "--input")
    assert collection(f"{bucket}{options}", "--input") == f"{bucket}{options}"
    with pytest.raises(InputError, match="cannot be reached"):
        collection("s3://footage/set?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1", "--input")
    with pytest.raises(ArtifactError, match="not a location that can be opened"):
        find_sources("nonsense://footage/set")
