"""From the work folder to the dataset: sorted, each clip once, and counts that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arlon_ray.artifact import ArtifactError
from data_pipeline import finish, schema
from data_pipeline.collection import empty_collection
from data_pipeline.finish import merged, write_latents
from data_pipeline.manifest import DatasetManifest, differences, finished_manifest, read_manifest
from data_pipeline.report import build_report, format_report
from data_pipeline.schema import CLIP, ENCODED, REJECT, REJECTED_BUCKET, SCHEMA_VERSION, SEEN, SOURCE, Row, reject_row
from data_pipeline.staging import Staging


def clip(clip_id: int) -> Row:
    """A row of `CLIP`."""
    return {
        "clip_id": clip_id,
        "source": f"{clip_id}.mp4",
        "uri": "/a",
        "start_s": 0.0,
        "end_s": 1.0,
        "fps": 16.0,
        "height": 16,
        "width": 16,
        "num_frames": 34,
        "given_frames": 0,
        "caption": "c",
        "source_height": 16,
        "source_width": 16,
        "source_duration_s": 1.0,
        "bucket": "34x16x16",
    }


def encoded(clip_id: int, reason: str = "", phash: bytes = b"") -> Row:
    """A row as the encoders write it; by default no two hashes are alike."""
    own = np.random.default_rng(clip_id).bytes(24)
    return {
        **clip(clip_id),
        **dict.fromkeys(schema.SCORES.names),
        "phash": phash or own,
        "latent": bytes([clip_id]),
        "latent_shape": [1],
        "text_embedding": b"",
        "text_length": 0,
        "bucket": REJECTED_BUCKET if reason else "34x16x16",
        "stage": "decode" if reason else "",
        "reason": reason,
        "error": "",
    }


def fill(folder: Path, files: list[list[Row]]) -> Staging:
    """A work folder with these files of the encoders, whose clips are all that was found."""
    work = Staging(folder)
    work.start({"a": 1})
    ids = {row["clip_id"] for rows in files for row in rows}
    clips = pa.Table.from_pylist([clip(number) for number in sorted(ids)], schema=CLIP)
    rejects = [reject_row("x.mp4", "clips", schema.EMPTY), reject_row("y.mp4", "clips", schema.TOO_SHORT, clip_id=99)]
    work.write_clips((clips, pa.Table.from_pylist(rejects, schema=REJECT)), {99})
    for number, rows in enumerate(files):
        place = work.encoded / f"bucket={rows[0]['bucket']}"
        place.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=ENCODED).drop(["bucket"]), place / f"{number}.parquet")
    return work


@pytest.mark.parametrize("sort_bytes", [1 << 30, 1])
def test_clips_written_twice_are_kept_once_and_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort_bytes: int
) -> None:
    monkeypatch.setattr(finish, "SORT_BYTES", sort_bytes)
    monkeypatch.setattr(finish, "FILE_ROW_GROUPS", 1)
    work = fill(tmp_path, [[encoded(7), encoded(3)], [encoded(3), encoded(5), encoded(5)], [encoded(9), encoded(8)]])
    assert work.encoded_rows() == 7
    there, wanted = tmp_path / "there", np.array([3, 5, 7, 9])
    (there / "bucket=34x16x16").mkdir(parents=True)
    (there / "bucket=34x16x16" / "part-00003.parquet").touch()
    assert write_latents(work, wanted, tmp_path / "latents", 2, there) == {"34x16x16": 4}
    files = sorted((tmp_path / "latents" / "bucket=34x16x16").glob("*.parquet"))
    ids = [pq.ParquetFile(path).read()["clip_id"].to_pylist() for path in files]
    assert ids == ([[3, 5], [7, 9]] if sort_bytes > 1 else [[3, 7], [5], [9]])
    assert files[0].name == "part-00004.parquet"  # after what is there already
    assert pq.ParquetFile(files[0]).schema_arrow.equals(schema.LATENT)


def test_a_file_whose_writer_was_killed_is_pending_again(tmp_path: Path) -> None:
    work = fill(tmp_path, [[encoded(1), encoded(2)], [encoded(3)], [encoded(4, schema.DECODE_FAILED)]])
    broken = work.encoded / "bucket=34x16x16" / "0.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    assert work.encoded_rows() == 2
    pending = [part["clip_id"].to_pylist() for part in work.pending(rows_per_part=1)]
    assert pending == [[1], [2]] and not broken.exists()
    with pytest.raises(RuntimeError, match="4 clips were to be encoded, 2 were"):
        merged(work, empty_collection(), SOURCE.empty_table(), None)


def test_the_tables_of_the_dataset_hold_everyone_once(tmp_path: Path) -> None:
    rows = [[encoded(2, schema.DECODE_FAILED), encoded(2, schema.DECODE_FAILED)], [encoded(1)]]
    merge = merged(fill(tmp_path, rows), empty_collection(), SOURCE.empty_table(), None)
    assert [(row["source"], row["clip_id"], row["stage"]) for row in merge.rejects.to_pylist()] == [
        ("2.mp4", 2, "decode"),
        ("x.mp4", None, "clips"),
    ]
    assert merge.seen.schema.equals(SEEN) and merge.seen["reason"].to_pylist() == ["", schema.DECODE_FAILED]
    assert merge.kept["clip_id"].to_pylist() == [1] and merge.kept["bucket"].to_pylist() == ["34x16x16"]


def test_near_duplicates_of_the_dataset_and_of_each_other_are_left_out(tmp_path: Path) -> None:
    same = bytes(24)
    first = merged(fill(tmp_path / "a", [[encoded(5, phash=same)]]), empty_collection(), SOURCE.empty_table(), 4)
    nearly = b"\x03" + bytes(23)
    other = b"\xff" * 24
    rows = [[encoded(1, phash=nearly), encoded(2, phash=other), encoded(3, phash=other), encoded(4)]]
    merge = merged(fill(tmp_path / "b", rows), first, SOURCE.empty_table(), 4)
    assert merge.kept["clip_id"].to_pylist() == [5, 2, 4]
    found = {row["clip_id"]: row["error"] for row in merge.rejects.to_pylist() if row["clip_id"]}
    assert found == {1: "of 5.mp4 at 0.00 s", 3: "of 2.mp4 at 0.00 s"}
    off = merged(fill(tmp_path / "c", rows), first, SOURCE.empty_table(), None)
    assert len(off.kept) == 5


def test_report_adds_up_or_refuses() -> None:
    rejects = [
        reject_row("b", "clips", schema.TOO_SHORT),
        reject_row("a", "decode", schema.DECODE_FAILED, clip_id=1, start_s=0.0, end_s=1.0),
    ]
    report = build_report(["a", "b"], ["a", "a", "a"], ["a", "a"], rejects)
    assert report["total"] == {"in": 4, "kept": 2, "filtered": 1, "failed": 1}
    assert report["sources"]["a"] == {"in": 3, "kept": 2, "filtered": 0, "failed": 1}
    text = format_report(report)
    assert "4 in = 2 kept + 1 filtered + 1 failed" in text and "too short" in text
    with pytest.raises(RuntimeError, match="a: rows do not add up"):
        build_report(["a", "b"], ["a", "a", "a"], ["a"], rejects)
    with pytest.raises(RuntimeError, match="c: rows do not add up"):
        build_report(["a", "b", "c"], ["a", "a", "a"], ["a", "a"], rejects)


def test_differences_are_named_with_short_values() -> None:
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": "x" * 99}) == "b (2 → 3), c (None → xxxxxxxxxxxx…)"


def test_unfinished_datasets_are_not_taken_for_finished(tmp_path: Path) -> None:
    assert finished_manifest(tmp_path, DatasetManifest) is None
    (tmp_path / "manifest.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}, "rows": 3}}')
    assert finished_manifest(tmp_path, DatasetManifest) is None
    with pytest.raises(ArtifactError, match=r"manifest.json: damaged: key: Field required"):
        read_manifest(tmp_path, DatasetManifest)
