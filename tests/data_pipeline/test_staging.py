"""From the work folder to the dataset: sorted, each clip once, and counts that add up."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arlon_ray.artifact import ArtifactError
from data_pipeline import schema, staging
from data_pipeline.manifest import DatasetManifest, differences, finished_manifest, read_manifest
from data_pipeline.report import build_report, format_report
from data_pipeline.schema import ENCODED, REJECTED_BUCKET, Row, reject_row
from data_pipeline.staging import Staging, write_latents


def encoded(clip_id: int, reason: str = "") -> Row:
    """A row as the encoders write it."""
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
        "caption": "c",
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
    """A work folder with these files of the encoders."""
    work = Staging(folder)
    work.start({"a": 1})
    work.write_clips([], [reject_row("x.mp4", "clips", schema.EMPTY)], 4)
    for number, rows in enumerate(files):
        place = work.encoded / f"bucket={rows[0]['bucket']}"
        place.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=ENCODED).drop(["bucket"]), place / f"{number}.parquet")
    return work


@pytest.mark.parametrize("sort_bytes", [1 << 30, 1])
def test_clips_written_twice_are_kept_once_and_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sort_bytes: int
) -> None:
    monkeypatch.setattr(staging, "SORT_BYTES", sort_bytes)
    monkeypatch.setattr(staging, "FILE_ROW_GROUPS", 1)
    work = fill(tmp_path, [[encoded(7), encoded(3)], [encoded(3), encoded(5), encoded(5)], [encoded(9)]])
    assert work.encoded_rows() == 6
    assert write_latents(work, ["34x16x16"], tmp_path / "latents", row_group=2) == {"34x16x16": 4}
    files = sorted((tmp_path / "latents" / "bucket=34x16x16").glob("*.parquet"))
    ids = [pq.ParquetFile(path).read()["clip_id"].to_pylist() for path in files]
    assert ids == ([[3, 5], [7, 9]] if sort_bytes > 1 else [[3, 7], [5], [9]])
    assert pq.ParquetFile(files[0]).schema_arrow.equals(schema.LATENT)


def test_rejects_of_all_stages_come_together(tmp_path: Path) -> None:
    work = fill(tmp_path, [[encoded(2, schema.DECODE_FAILED), encoded(2, schema.DECODE_FAILED)], [encoded(1)]])
    rows = work.all_rejects().to_pylist()
    assert [(row["source"], row["clip_id"], row["stage"]) for row in rows] == [
        ("2.mp4", 2, "decode"),
        ("x.mp4", None, "clips"),
    ]


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
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "rows": 3}')
    assert finished_manifest(tmp_path, DatasetManifest) is None
    with pytest.raises(ArtifactError, match=r"manifest.json: damaged: key: Field required"):
        read_manifest(tmp_path, DatasetManifest)
