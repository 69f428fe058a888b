"""What a dataset knows of its input, and what a run has to do where there is a dataset already.

sources.parquet    every file, with the identity and caption it had
manifest.parquet   every clip that was looked at, with its scores, and why it is not in the dataset (empty: it is)
rejects.parquet    why files and clips are not in the dataset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from arlon_ray.artifact import ArtifactError, fetched
from data_pipeline import schema
from data_pipeline.parquet import read_table
from data_pipeline.schema import REJECT, SEEN, SOURCE, Row
from data_pipeline.sources import SourceFile

#: Files named in one message.
NAMED_FILES = 3
#: Rejects that may become clips when they are tried again: failures, and captions that were written since. The others
#: follow from the input and the settings.
RETRIED_FILTERS = frozenset({schema.MISSING_CAPTION})


@dataclass(frozen=True)
class Collection:
    """The tables of a dataset: `sources` (schema.SOURCE), `seen` (schema.SEEN), `rejects` (schema.REJECT)."""

    sources: pa.Table
    seen: pa.Table
    rejects: pa.Table

    @cached_property
    def kept(self) -> pa.Table:
        """The clips in the dataset, rows of `seen`."""
        return self.seen.filter(pc.equal(self.seen["reason"], ""))


@dataclass(frozen=True)
class Plan:
    """What a run has to do: look for clips in the files `search`, but for the clip ids `settled`.

    `before` is what stays of the dataset that is there.
    """

    search: list[SourceFile]
    settled: frozenset[int]
    before: Collection


def read_collection(folder: Path) -> Collection:
    """The tables of a finished dataset. Raises ArtifactError where one is missing or damaged."""
    tables = []
    for name, expected in (("sources", SOURCE), ("manifest", SEEN), ("rejects", REJECT)):
        path = fetched(folder / f"{name}.parquet")
        try:
            tables.append(read_table(path).cast(expected))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise ArtifactError(f"{path}: cannot be read: {schema.one_line(error)}: preprocess again") from None
    return Collection(*tables)


def empty_collection() -> Collection:
    """What is known before a first run."""
    return Collection(SOURCE.empty_table(), SEEN.empty_table(), REJECT.empty_table())


def source_rows(sources: Sequence[SourceFile]) -> pa.Table:
    """Files as a table of `schema.SOURCE`."""
    rows = [{"source": s.name, "size": s.size, "identity": s.identity, "caption": s.caption.said} for s in sources]
    return pa.Table.from_pylist(rows, schema=SOURCE)


def retried(reason: str) -> bool:
    """Whether a reject of this reason is tried again by `--retry-rejects`."""
    return reason not in schema.FILTER_REASONS or reason in RETRIED_FILTERS


def plan(sources: list[SourceFile], there: Collection, retry: bool) -> Plan:
    """What to do with `sources` where the dataset `there` exists: files that are new, and with `retry` the rejects.

    Raises ArtifactError where the input lacks files that clips of the dataset are from, or has others in their place:
    a dataset is what the whole of its input gives.
    """
    known: dict[str, Row] = {row["source"]: row for row in there.sources.to_pylist()}
    used = set(there.kept["source"].to_pylist())
    given = {source.name: source for source in sources}
    changed = [name for name, row in known.items() if name in given and not _same(given[name], row)]
    _refuse("lacks", [name for name in known if name not in given and name in used])
    _refuse("has other content or another caption for", [name for name in changed if name in used])
    if stale := [name for name in changed if name not in used and not retry]:
        print(f"note: {_named(stale)} changed since rejected: --retry-rejects tries them again", flush=True)
    rejects = there.rejects.to_pylist()
    again = {row["source"] for row in rejects if retried(row["reason"])} | set(changed) if retry else set()
    search = [source for source in sources if source.name not in known or source.name in again]
    # of a file that is searched again, what is in the dataset or was filtered stays as it is
    dropped = {(row["source"], row["clip_id"]) for row in rejects if row["source"] in again and retried(row["reason"])}
    dropped |= {(row["source"], row["clip_id"]) for row in rejects if row["source"] in changed and retry}
    gone = {clip_id for _, clip_id in dropped if clip_id is not None}
    seen = there.seen.filter(pa.array(~np.isin(there.seen["clip_id"].to_numpy(), np.array(sorted(gone), np.int64))))
    stays = [row for row in rejects if (row["source"], row["clip_id"]) not in dropped]
    names = there.sources["source"].to_pylist()
    before = Collection(
        sources=there.sources.filter(pa.array([name not in again for name in names], pa.bool_())),
        seen=seen,
        rejects=pa.Table.from_pylist(stays, schema=REJECT),
    )
    settled = frozenset(seen["clip_id"].to_pylist()) | {row["clip_id"] for row in stays if row["clip_id"] is not None}
    return Plan(search, settled, before)


def _same(source: SourceFile, row: Row) -> bool:
    return (source.size, source.identity, source.caption.said) == (row["size"], row["identity"], row["caption"])


def _refuse(verb: str, names: list[str]) -> None:
    if names:
        raise ArtifactError(
            f"--input {verb} {_named(names)} that clips of this dataset are from: give the whole input again, with "
            "what is new; or choose another --output; or make it anew with --overwrite"
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_FILES} more files" if len(names) > NAMED_FILES else ""
    return ", ".join(names[:NAMED_FILES]) + more
