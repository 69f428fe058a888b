"""Parquet files with a checksum in every page: a byte that has changed on disk is an error, not another latent.

Files that were written without checksums are read all the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arlon_ray import mirror

#: How every file is written.
WRITTEN: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """A file to read from, here or in a bucket, of which only what is asked for is read.

    Raises OSError or ArrowInvalid, also later, where it is damaged.
    """
    return pq.ParquetFile(mirror.readable(Path(path)), page_checksum_verification=True)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of one file. Raises as `open_parquet` does."""
    return open_parquet(path).read(columns=columns)


def write_table(table: pa.Table, path: Path, row_group: int | None = None) -> None:
    """Write a file that appears whole or not at all, here or in a bucket. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        pq.write_table(table, partial, row_group_size=row_group or 1 << 20, **WRITTEN)
        os.replace(partial, path)
        mirror.push(path)
    finally:
        partial.unlink(missing_ok=True)
