"""The work folder of a run that is under way, and how its pieces become the finished dataset.

.work/settings.json                what the run was started with
.work/clips/part-*.parquet         clip rows, a few dozen each: the units in which the work is handed out
.work/rejects.parquet              rejects of the clip stage; written last, so where it is, the clips are all there
.work/encoded/bucket=*/*.parquet   what the encoders wrote, in the order in which they happened to finish
.work/checkpoint/                  Ray Data's list of finished clips
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arlon_ray.artifact import whole_folder, write_json
from data_pipeline.schema import CLIP, LATENT, REJECT, REJECTED_BUCKET, Row

WORK = ".work"
#: A bucket up to this size is sorted as a whole; a larger one piece by piece.
SORT_BYTES = 1 << 30
#: Row groups of one finished file.
FILE_ROW_GROUPS = 64


class Staging:
    """Paths of one run's work folder, and its settings."""

    def __init__(self, output: Path) -> None:
        self.root = output / WORK
        self.clips, self.encoded, self.checkpoint = self.root / "clips", self.root / "encoded", self.root / "checkpoint"
        self.rejects = self.root / "rejects.parquet"

    def settings(self) -> dict[str, Any] | None:
        """The settings of the run under way; None if there is none."""
        try:
            found = json.loads((self.root / "settings.json").read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def start(self, settings: dict[str, Any]) -> None:
        """Begin anew: whatever lay here is removed."""
        self.remove()
        for folder in (self.clips, self.encoded, self.checkpoint):
            folder.mkdir(parents=True)
        write_json(self.root / "settings.json", settings)

    def remove(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.root, ignore_errors=True)

    def write_clips(self, clips: list[Row], rejects: list[Row], rows_per_part: int) -> None:
        """Write what the clip stage found, ordered by bucket, so that one part has (but for seams) one shape."""
        ordered = sorted(clips, key=lambda row: (row["num_frames"], row["source"], row["start_s"]))
        for number, first in enumerate(range(0, len(ordered), rows_per_part)):
            part = pa.Table.from_pylist(ordered[first : first + rows_per_part], schema=CLIP)
            pq.write_table(part, self.clips / f"part-{number:06d}.parquet")
        write_table(pa.Table.from_pylist(rejects, schema=REJECT), self.rejects)

    def read_clips(self) -> pa.Table:
        """All clip rows."""
        parts = [pq.read_table(path) for path in sorted(self.clips.glob("part-*.parquet"))]
        return pa.concat_tables(parts) if parts else CLIP.empty_table()

    def encoded_files(self, bucket: str) -> list[Path]:
        """Files that the encoders wrote for `bucket`."""
        return sorted((self.encoded / f"bucket={bucket}").glob("*.parquet"))

    def encoded_rows(self) -> int:
        """Rows that the encoders have written so far, rejected ones included."""
        rows = 0
        for path in self.encoded.glob("bucket=*/*.parquet"):
            try:
                rows += pq.read_metadata(path).num_rows
            except (OSError, pa.ArrowInvalid):  # being written
                continue
        return rows

    def all_rejects(self) -> pa.Table:
        """Rejects of all stages, ordered by source and start."""
        tables = [pq.read_table(self.rejects)]
        for path in self.encoded_files(REJECTED_BUCKET):
            tables.append(pq.ParquetFile(path).read(columns=REJECT.names).select(REJECT.names).cast(REJECT))
        table = _unique(pa.concat_tables(tables))
        return table.sort_by([("source", "ascending"), ("start_s", "ascending")])


def write_table(table: pa.Table, path: Path, row_group: int | None = None) -> None:
    """Write a Parquet file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, row_group_size=row_group or 1 << 20, compression="zstd")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_latents(staging: Staging, buckets: Iterable[str], target: Path, row_group: int) -> dict[str, int]:
    """Write `latents/` from the encoders' files, in an order that depends on the clips alone; rows by bucket.

    A clip written twice (a run that was killed between writing and noting it) is kept once. The folder appears whole.
    """
    counts: dict[str, int] = {}
    with whole_folder(target) as folder:
        for bucket in sorted(buckets):
            number = 0
            for table in _sorted_pieces(staging.encoded_files(bucket)):
                for first in range(0, len(table), row_group * FILE_ROW_GROUPS):
                    place = folder / f"bucket={bucket}"
                    place.mkdir(exist_ok=True)
                    piece = table.slice(first, row_group * FILE_ROW_GROUPS)
                    write_table(piece, place / f"part-{number:05d}.parquet", row_group)
                    counts[bucket] = counts.get(bucket, 0) + len(piece)
                    number += 1
    return counts


def _sorted_pieces(files: list[Path]) -> Iterator[pa.Table]:
    """Tables of up to about `SORT_BYTES`, each sorted by clip id, without repetition over all of them."""
    seen: NDArray[np.int64] = np.array([], np.int64)
    pending: list[pa.Table] = []
    for position, path in enumerate(files):
        table = pq.ParquetFile(path).read(columns=LATENT.names).select(LATENT.names).cast(LATENT)
        pending.append(table)
        if sum(part.nbytes for part in pending) < SORT_BYTES and position + 1 < len(files):
            continue
        piece = _unique(pa.concat_tables(pending))
        ids = piece["clip_id"].to_numpy()
        piece = piece.filter(pa.array(~np.isin(ids, seen)))
        seen = np.union1d(seen, ids)
        pending = []
        yield piece.sort_by("clip_id")


def _unique(table: pa.Table) -> pa.Table:
    """The first row of each clip id; rows without one are all kept."""
    ids = table["clip_id"]
    values = ids.to_numpy(zero_copy_only=False) if not ids.null_count else None
    if values is None:
        listed = ids.to_pylist()
        known = [value for value in listed if value is not None]
        if len(set(known)) == len(known):
            return table
        met: set[int] = set()
        keep = [value is None or not (value in met or met.add(value)) for value in listed]  # type: ignore[func-returns-value]
        return table.filter(pa.array(keep))
    _, first = np.unique(values, return_index=True)
    return table.take(pa.array(np.sort(first)))
