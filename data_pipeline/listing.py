"""A list of videos: CSV, JSON lines or Parquet with a column of paths and, if wanted, one of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import csv, json, parquet

from arlon_ray.artifact import ArtifactError
from data_pipeline import schema, storage
from data_pipeline.schema import one_line


def _csv(file: BinaryIO) -> pa.Table:
    # "007" is a caption or a name, never a number
    names = csv.open_csv(file).schema.names
    file.seek(0)
    return csv.read_csv(file, convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


READERS: dict[str, Callable[[BinaryIO], pa.Table]] = {
    ".csv": _csv,
    ".jsonl": json.read_json,
    ".ndjson": json.read_json,
    ".parquet": parquet.read_table,
}


@dataclass(frozen=True)
class Video:
    """A video that an input names; nothing of it is read yet. `name` is its path within the input, `path` its location.

    `caption` None where the input has none. `path` None where there is no file to read: `error` says why, `reason`
    what kind of reject that is.
    """

    name: str
    path: str | None
    caption: str | None = None
    error: str = ""
    reason: str = schema.UNREADABLE


def is_list(location: str) -> bool:
    """Whether a file is a list of videos, by its suffix."""
    return _suffix(location) in READERS


def _suffix(location: str) -> str:
    return Path(storage.base_name(location)).suffix.lower()


def read_list(path: str, path_column: str, caption_column: str) -> Iterator[Video]:
    """Rows of a list, in its order; relative paths start at the list's folder. Of two rows for one file the first
    counts: a clip is in a dataset once.

    Raises ArtifactError if it cannot be read, has no `path_column`, or either column holds something other than text.
    """
    try:
        with storage.open_input(path) as file:
            table = READERS[_suffix(path)](file)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: cannot be read as {_suffix(path)[1:]}: {one_line(error)}") from None
    if path_column not in table.column_names:
        raise ArtifactError(
            f"{path}: no column {path_column!r}, it has {', '.join(table.column_names)}; "
            "name the column of paths with --set data.path_column=NAME"
        )
    names = _texts(path, table, path_column)
    captions = _texts(path, table, caption_column) if caption_column in table.column_names else [None] * len(table)
    rows: dict[str, int] = {}
    for row, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
        if not name:
            yield Video(f"{storage.base_name(path)} row {row}", None, error=f"row {row} has no {path_column}")
        elif (first := rows.setdefault(name, row)) != row:
            yield Video(name, None, error=f"row {row}: row {first} has it already", reason=schema.LISTED_TWICE)
        else:
            yield Video(name, storage.child(storage.parent(path), name), caption)


def _texts(path: str, table: pa.Table, column: str) -> list[str | None]:
    values = table[column]
    if pa.types.is_null(values.type):
        return [None] * len(values)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ArtifactError(f"{path}: column {column!r} holds {values.type}, expected text")
    return [value.strip() if value else None for value in values.to_pylist()]
