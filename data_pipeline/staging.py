"""The work folder of a run that is under way. What lies here makes the next run go on where this one stopped.

.work/settings.json                what the run was started with; written last when a run begins
.work/found/*.parquet              what the clip stage found in some files: clip rows, and rejects beside them
.work/clips.parquet                all of it, in the order in which it is worked on; where it is, the search is over
.work/rejects.parquet              rejects of the clip stage
.work/encoded/bucket=*/*.parquet   what the encoders wrote, in the order in which they happened to finish
.work/ready/                       the finished dataset, whole, before it takes its place (`finish.py`)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arlon_ray import mirror
from arlon_ray.artifact import fetched, write_json
from data_pipeline.parquet import open_parquet, read_table, write_table
from data_pipeline.schema import CLIP, REJECT

WORK = ".work"
Found = tuple[pa.Table, pa.Table]


class Staging:
    """Paths of one run's work folder, and its settings."""

    def __init__(self, output: Path) -> None:
        self.root = fetched(output / WORK)
        self.found, self.encoded = self.root / "found", self.root / "encoded"
        self.ready = self.root / "ready"
        self.clips, self.rejects = self.root / "clips.parquet", self.root / "rejects.parquet"
        self._counted: dict[Path, int] = {}

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
        for folder in (self.found, self.encoded):
            folder.mkdir(parents=True)
        write_json(self.root / "settings.json", settings)

    def search_again(self, settings: dict[str, Any]) -> None:
        """The input is another one: forget which clips there are, keep what is found and encoded of those files."""
        for path in (self.clips, self.rejects):
            mirror.remove(path)
        write_json(self.root / "settings.json", settings)

    def remove(self) -> None:
        """Remove the work folder."""
        mirror.remove(self.root)

    def read_found(self, key: str) -> Found | None:
        """What was found in the files that `key` stands for; None if they were not searched yet."""
        path = self.found / f"{key}.parquet"
        if not path.exists():
            return None
        return read_table(path), read_table(self._rejects_of(key))

    def write_found(self, key: str, found: Found) -> None:
        """Note what was found in some files."""
        self.found.mkdir(parents=True, exist_ok=True)
        write_table(found[1], self._rejects_of(key))
        write_table(found[0], self.found / f"{key}.parquet")

    def _rejects_of(self, key: str) -> Path:
        return self.found / f"{key}.rejects.parquet"

    def write_clips(self, found: Found, settled: Collection[int]) -> None:
        """End the clip stage: what it found but for the clips `settled`.

        Ordered by bucket, so that one part of the work has (but for seams) one shape.
        """
        done = pa.array(sorted(settled), pa.int64())
        clips, rejects = (table.filter(pc.invert(pc.is_in(table["clip_id"], done))) for table in found)
        write_table(rejects, self.rejects)
        order = [("bucket", "ascending"), ("source", "ascending"), ("start_s", "ascending")]
        write_table(clips.sort_by(order), self.clips)

    def read_clips(self) -> pa.Table:
        """All clip rows."""
        return read_table(self.clips).cast(CLIP)

    def pending(self, rows_per_part: int) -> list[pa.Table]:
        """The clips that are not encoded yet, in the parts in which the work is handed out.

        Removes files of the encoders that cannot be read in whole, and what was in them is pending: a killed writer
        leaves such, or a disk that forgets.
        """
        done = [read_table(path, columns=["clip_id"])["clip_id"] for path in self.encoded_files(remove_broken=True)]
        ids = np.concatenate([column.to_numpy() for column in done]) if done else np.array([], np.int64)
        clips = self.read_clips()
        left = clips.filter(pa.array(~np.isin(clips["clip_id"].to_numpy(), ids))).combine_chunks()
        return [left.slice(first, rows_per_part) for first in range(0, len(left), rows_per_part)]

    def encoded_files(self, bucket: str = "*", *, remove_broken: bool = False) -> list[Path]:
        """Whole files that the encoders wrote, for one bucket or all."""
        whole = []
        mirror.pull(self.encoded)
        for path in sorted(self.encoded.glob(f"bucket={bucket}/*.parquet")):
            try:
                if remove_broken:
                    for _ in open_parquet(path).iter_batches():
                        pass
                else:
                    pq.read_metadata(path)
                whole.append(path)
            except (OSError, pa.ArrowInvalid):  # being written, or its writer was killed
                if remove_broken:
                    mirror.remove(path)
        return whole

    def encoded_rows(self) -> int:
        """Rows that the encoders have written so far, rejected ones included."""
        with suppress(OSError):  # of the bucket: the next look may be luckier
            mirror.pull(self.encoded)
        for path in self.encoded.glob("bucket=*/*.parquet"):
            if path not in self._counted:
                try:
                    self._counted[path] = pq.read_metadata(path).num_rows
                except (OSError, pa.ArrowInvalid):  # being written
                    continue
        return sum(self._counted.values())


def read_columns(files: Iterable[Path], schema: pa.Schema, wanted: NDArray[np.int64]) -> pa.Table:
    """The columns of `schema` of the encoders' files, each of the `wanted` clips once."""
    # not as a data set: the bucket in the folder's name is not a column of the files
    tables = [read_table(path, schema.names).select(schema.names).cast(schema) for path in files]
    return unique(pa.concat_tables(tables), wanted) if tables else schema.empty_table()


def unique(table: pa.Table, wanted: NDArray[np.int64]) -> pa.Table:
    """The first row of each clip id that is wanted; rows without an id stay out."""
    ids = table["clip_id"].to_numpy()
    _, first = np.unique(ids, return_index=True)
    first = first[np.isin(ids[first], wanted)]
    return table.take(pa.array(np.sort(first)))


def empty_found() -> Found:
    """No clips and no rejects."""
    return CLIP.empty_table(), REJECT.empty_table()
