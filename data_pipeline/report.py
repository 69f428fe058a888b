"""Counts of a run: in = kept + filtered + failed, for every source and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from data_pipeline.schema import FILTER_REASONS, STAGE_CLIPS, Row

#: Sources with losses that the printed table names.
SHOWN_SOURCES = 8


def build_report(
    sources: Iterable[str], found: Iterable[str], kept: Iterable[str], rejects: Iterable[Row]
) -> dict[str, Any]:
    """The content of `report.json`.

    `sources`: every file; `found`: the source of every clip handed to the encoders; `kept`: the source of every clip
    in the dataset; `rejects`: every reject row. A unit is a clip, or a file that yielded none.
    Raises RuntimeError if a unit is lost or counted twice: that is a fault of the program.
    """
    rows = list(rejects)
    names = list(sources)
    ins = Counter(found)
    # found clips that were rejected later are in `found` already
    ins.update(row["source"] for row in rows if row["stage"] == STAGE_CLIPS)
    kept_of = Counter(kept)
    filtered = Counter(row["source"] for row in rows if row["reason"] in FILTER_REASONS)
    failed = Counter(row["source"] for row in rows if row["reason"] not in FILTER_REASONS)
    per_source = {
        name: {"in": ins[name], "kept": kept_of[name], "filtered": filtered[name], "failed": failed[name]}
        for name in names
    }
    for name, counts in per_source.items():
        if counts["in"] != counts["kept"] + counts["filtered"] + counts["failed"] or not counts["in"]:
            raise RuntimeError(f"{name}: rows do not add up: {counts}")
    return {
        "files": len(names),
        "total": {
            column: sum(counts[column] for counts in per_source.values())
            for column in ("in", "kept", "filtered", "failed")
        },
        "reasons": dict(Counter(row["reason"] for row in rows).most_common()),
        "sources": per_source,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as a few lines of text: totals, reasons, and the sources that lost most."""
    total = report["total"]
    lines = [
        f"{report['files']} files: {total['in']} in = {total['kept']} kept + {total['filtered']} filtered "
        f"+ {total['failed']} failed"
    ]
    lines += [f"  {count:6d}  {reason}" for reason, count in report["reasons"].items()]
    lossy = sorted(
        ((counts["filtered"] + counts["failed"], name) for name, counts in report["sources"].items()), reverse=True
    )
    lossy = [(lost, name) for lost, name in lossy if lost]
    lines += [
        f"          {name}: {lost} of {report['sources'][name]['in']} lost" for lost, name in lossy[:SHOWN_SOURCES]
    ]
    if len(lossy) > SHOWN_SOURCES:
        lines.append(f"          … and {len(lossy) - SHOWN_SOURCES} more files (report.json, rejects.parquet)")
    return "\n".join(lines)
