"""Patterns and lists of videos as input."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import DataConfig, VideoConfig
from data_pipeline import schema
from data_pipeline.clips import find_clips
from data_pipeline.sources import find_sources, is_pattern
from tests.data_pipeline.inputs import numbered, write_video
from tests.scripts import run_script

ROWS = [
    {"path": "a/one.mp4", "caption": "007"},
    {"path": "two.mp4", "caption": None},
    {"path": "gone.mp4", "caption": "lost"},
    {"path": "a/one.mp4", "caption": "again"},
    {"path": None, "caption": "of nothing"},
]


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for name in ("a/one.mp4", "two.mp4"):
        write_video(tmp_path / name, numbered(34))
    (tmp_path / "two.txt").write_text("beside the file")
    return tmp_path


def write_list(path: Path) -> Path:
    """`ROWS` in the format of the suffix."""
    if path.suffix == ".csv":
        lines = [f"{row['path'] or ''},{row['caption'] or ''}" for row in ROWS]
        path.write_text("\n".join(["path,caption", *lines]) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_every_row_of_a_list_is_a_source_or_a_reject(videos: Path, suffix: str) -> None:
    sources = find_sources(write_list(videos / f"list.{suffix}"))
    assert [source.name for source in sources] == [
        "a/one.mp4", "two.mp4", "gone.mp4", "a/one.mp4", f"list.{suffix} row 5"
    ]  # fmt: skip
    assert [source.caption.said for source in sources[:3]] == ["007", "beside the file", "lost"]
    found = [find_clips(source, VideoConfig(height=32, width=32), DataConfig(bucket_groups=(2,))) for source in sources]
    assert [len(clips) for clips, _ in found] == [1, 1, 0, 0, 0]
    reasons = [reject["reason"] for _, rejects in found for reject in rejects]
    assert reasons == [schema.UNREADABLE, schema.LISTED_TWICE, schema.UNREADABLE]
    assert "row 4: row 1 has it already" in found[3][1][0]["error"] and "row 5 has no path" in found[4][1][0]["error"]


def test_columns_may_have_other_names(videos: Path) -> None:
    (videos / "list.csv").write_text("file,text\ntwo.mp4,by the list\n")
    (source,) = find_sources(videos / "list.csv", DataConfig(path_column="file", caption_column="text"))
    assert source.caption.said == "by the list" and source.size
    with pytest.raises(ArtifactError, match="no column 'path', it has file, text; name the column"):
        find_sources(videos / "list.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.jsonl", "{not json", "cannot be read as jsonl"),
        ("list.parquet", "not parquet", "cannot be read as parquet"),
        ("list.csv", "", "cannot be read as csv"),
        ("list.jsonl", '{"path": 3}', "column 'path' holds int64, expected text"),
    ],
)
def test_a_bad_list_is_refused_by_name(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=message):
        find_sources(tmp_path / name)


def test_patterns_match_videos_at_any_depth(videos: Path) -> None:
    assert [source.name for source in find_sources(videos / "*.mp4")] == ["two.mp4"]
    assert [source.name for source in find_sources(f"{videos}/**/*")] == ["a/one.mp4", "two.mp4"]
    assert find_sources(videos / "**" / "one.*")[0].path == str(videos / "a" / "one.mp4")
    (videos / "odd[1].mp4").write_bytes(b"")
    assert not is_pattern(videos / "odd[1].mp4") and find_sources(videos / "odd[1].mp4")[0].name == "odd[1].mp4"


def test_a_bad_list_ends_the_job_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file\na.mp4\n")
    result = run_script("preprocess", "--input", str(tmp_path / "list.csv"), "--output", str(tmp_path / "out"))
    assert result.returncode == 2 and "no column 'path', it has file" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    result = run_script("preprocess", "--input", str(tmp_path / "*.mp4"), "--output", str(tmp_path / "out"))
    assert result.returncode == 2 and "no video files" in result.stderr
