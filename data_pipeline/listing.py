"""A list of videos: CSV, JSON lines or Parquet with a column of paths and, if wanted, one of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, json, parquet

from arlon_ray.artifact import ArtifactError
from data_pipeline.schema import one_line


def _csv(path: Path) -> pa.Table:
    # "007" is a caption or a name, never a number
    names = csv.open_csv(path).schema.names
    return csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())))


READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": _csv,
    ".jsonl": json.read_json,
    ".ndjson": json.read_json,
    ".parquet": parquet.read_table,
}


@dataclass(frozen=True)
class Listed:
    """One row. `name` as it stands in the list; `caption` None where the list has none; `error` if it names no file."""

    row: int
    name: str
    path: Path
    caption: str | None
    error: str = ""


def is_list(path: Path) -> bool:
    """Whether a file is a list of videos, by its suffix."""
    return path.suffix.lower() in READERS


def read_list(path: Path, path_column: str, caption_column: str) -> Iterator[Listed]:
    """Rows of a list, in its order; relative paths start at the list's folder.

    Raises ArtifactError if it cannot be read, has no `path_column`, or either column holds something other than text.
    """
    try:
        table = READERS[path.suffix.lower()](path)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path}: cannot be read as {path.suffix.lower()[1:]}: {one_line(error)}") from None
    if path_column not in table.column_names:
        raise ArtifactError(
            f"{path}: no column {path_column!r}, it has {', '.join(table.column_names)}; "
            "name the column of paths with --set data.path_column=NAME"
        )
    names = _texts(path, table, path_column)
    captions = _texts(path, table, caption_column) if caption_column in table.column_names else [None] * len(table)
    for row, (name, caption) in enumerate(zip(names, captions, strict=True), 1):
        if not name:
            yield Listed(row, f"{path.name} row {row}", path, caption, f"row {row} has no {path_column}")
        else:
            yield Listed(row, name, path.parent / Path(name).expanduser(), caption)


def _texts(path: Path, table: pa.Table, column: str) -> list[str | None]:
    values = table[column]
    if pa.types.is_null(values.type):
        return [None] * len(values)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise ArtifactError(f"{path}: column {column!r} holds {values.type}, expected text")
    return [value.strip() if value else None for value in values.to_pylist()]
