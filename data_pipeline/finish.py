"""From the work folder to the dataset: near-duplicates out, counts checked, files sorted, everything in its place.

The new dataset is first made whole in `.work/ready`, then moved. Parts of `latents/` that are there already stay as
they are: appending to a dataset costs what the new clips cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arlon_ray import mirror
from arlon_ray.artifact import whole_folder, write_json
from data_pipeline import schema
from data_pipeline.collection import Collection
from data_pipeline.duplicates import near_duplicates
from data_pipeline.footage import open_footage
from data_pipeline.manifest import MANIFEST, DatasetManifest, dataset_fingerprint, write_manifest
from data_pipeline.parquet import read_table, write_table
from data_pipeline.report import build_report
from data_pipeline.report_page import chosen_clips, write_report_page
from data_pipeline.schema import LATENT, REJECT, SEEN, STAGE_FILTER, Row, bucket_name
from data_pipeline.staging import Staging, read_columns, unique

#: A bucket up to this size is sorted as a whole; a larger one piece by piece.
SORT_BYTES = 1 << 30
#: Row groups of one finished file.
FILE_ROW_GROUPS = 64
#: Longer side, in pixels, of the pictures in the report.
PICTURE_SIDE = 160

#: What the encoders say of a clip, kept or not; the bucket is in the name of their folder.
_STAGED = pa.schema(
    [*(field for field in SEEN if field.name != "bucket"), REJECT.field("stage"), REJECT.field("error")]
)


def merged(staging: Staging, before: Collection, sources: pa.Table, bits: int | None) -> Collection:
    """The tables of the dataset `before` with the clips that are encoded now; `sources`: the files of this run.

    `bits`: filters.near_duplicate_bits. Raises RuntimeError where a clip was not encoded.
    """
    wanted = staging.read_clips()["clip_id"].to_numpy()
    staged = read_columns(staging.encoded_files(), _STAGED, wanted)
    if len(staged) != len(wanted):
        raise RuntimeError(f"{len(wanted)} clips were to be encoded, {len(staged)} were: run it again")
    staged = staged.sort_by([("source", "ascending"), ("start_s", "ascending")])
    rows = [
        {**row, "bucket": bucket_name(row["num_frames"], row["height"], row["width"])} for row in staged.to_pylist()
    ]
    if bits is not None:
        reject_duplicates(rows, before.kept, bits)
    lost = [{name: row[name] for name in REJECT.names} for row in rows if row["reason"]]
    rejects = [before.rejects, read_table(staging.rejects).cast(REJECT), pa.Table.from_pylist(lost, REJECT)]
    return Collection(
        sources=pa.concat_tables([before.sources, sources]).sort_by("source"),
        seen=pa.concat_tables([before.seen, pa.Table.from_pylist(rows, SEEN)]),
        rejects=pa.concat_tables(rejects).sort_by([("source", "ascending"), ("start_s", "ascending")]),
    )


def reject_duplicates(rows: list[Row], before: pa.Table, bits: int) -> None:
    """Mark the clips that are near-duplicates of one in the dataset, or of one that comes earlier."""
    fresh = [row for row in rows if not row["reason"]]
    known = before.select(["source", "start_s", "phash"]).to_pylist()
    everyone = [*known, *fresh]
    if not everyone:
        return
    hashes = np.frombuffer(b"".join(row["phash"] for row in everyone), np.uint8).reshape(len(everyone), -1)
    for row, of in zip(fresh, near_duplicates(hashes, bits)[len(known) :].tolist(), strict=True):
        if of >= 0:
            first = everyone[of]
            error = f"of {first['source']} at {first['start_s']:.2f} s"
            row.update(stage=STAGE_FILTER, reason=schema.NEAR_DUPLICATE, error=error)


def report_of(merge: Collection) -> dict[str, Any]:
    """The content of `report.json`."""
    found = merge.seen["source"].to_pylist()
    return build_report(
        merge.sources["source"].to_pylist(), found, merge.kept["source"].to_pylist(), merge.rejects.to_pylist()
    )


def write_rejects(output: Path, merge: Collection, report: dict[str, Any]) -> None:
    """Where nothing was kept and there is no dataset: why."""
    write_table(merge.rejects, output / "rejects.parquet")
    write_json(output / "report.json", report)


def described(merge: Collection, manifest: DatasetManifest) -> DatasetManifest:
    """The manifest with what it says of the clips: their number, buckets and fingerprint, and when it was made."""
    kept = merge.kept
    ids, captions, given = kept["clip_id"].to_numpy(), kept["caption"].to_pylist(), kept["given_frames"].to_pylist()
    return manifest.model_copy(
        update={
            "fingerprint": dataset_fingerprint(ids, manifest.key, captions, given),
            "rows": len(kept),
            "buckets": {row["values"]: row["counts"] for row in kept["bucket"].value_counts().to_pylist()},
            "rejects": len(merge.rejects),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def make_ready(
    staging: Staging,
    merge: Collection,
    report: dict[str, Any],
    manifest: DatasetManifest,
    write_parts: Callable[[Path], object],
) -> None:
    """Write the dataset to `.work/ready`; `write_parts` writes to a folder what becomes new parts of `latents/`."""
    with whole_folder(staging.ready) as folder:
        write_parts(folder / "latents")
        for name, table in (("sources", merge.sources), ("manifest", merge.seen), ("rejects", merge.rejects)):
            write_table(table, folder / f"{name}.parquet")
        write_json(folder / "report.json", report)
        kept = merge.kept
        pictures = dict(_pictures(merge.seen, chosen_clips(kept, merge.rejects)))
        shown = _shown_settings(manifest.settings)
        write_report_page(folder / "report.html", report, kept, merge.rejects, pictures, shown)
        write_manifest(folder, manifest)


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the thresholds, "filters.max_black" and so on, in one mapping."""
    dotted = {name for name in settings if name.startswith("filters.")}
    filters = {name.removeprefix("filters."): settings[name] for name in sorted(dotted)}
    return {name: value for name, value in settings.items() if name not in dotted} | {"filters": filters}


def publish(staging: Staging, output: Path) -> None:
    """Move what is ready into `output`, the manifest last; killed half-way, the next run goes on with it."""
    mirror.remove(output / MANIFEST)
    for path in sorted(staging.ready.glob("latents/*/*.parquet")):
        mirror.move(path, output / path.relative_to(staging.ready))
    mirror.forget(output / "latents")
    for path in sorted(staging.ready.glob("*.*")):
        if path.name != MANIFEST:
            mirror.move(path, output / path.name)
    mirror.move(staging.ready / MANIFEST, output / MANIFEST)
    staging.remove()


def write_latents(
    staging: Staging, wanted: NDArray[np.int64], target: Path, row_group: int, there: Path
) -> dict[str, int]:
    """Write the encoders' rows of the `wanted` clips below `target`, in an order that depends on them alone.

    A clip written twice (its writer was killed before it could say so) is kept once. Parts are numbered on from those
    in `there`. Returns rows by bucket.
    """
    counts: dict[str, int] = {}
    for place in sorted(staging.encoded.glob("bucket=*")):
        bucket = place.name.removeprefix("bucket=")
        if bucket == schema.REJECTED_BUCKET:
            continue
        parts = [int(path.stem.rpartition("-")[2]) for path in mirror.glob(there / place.name, "part-*.parquet")]
        number = max(parts, default=-1) + 1
        for table in _sorted_pieces(staging.encoded_files(bucket), wanted):
            for first in range(0, len(table), row_group * FILE_ROW_GROUPS):
                (target / place.name).mkdir(parents=True, exist_ok=True)
                piece = table.slice(first, row_group * FILE_ROW_GROUPS)
                write_table(piece, target / place.name / f"part-{number:05d}.parquet", row_group)
                counts[bucket] = counts.get(bucket, 0) + len(piece)
                number += 1
    return counts


def _sorted_pieces(files: Sequence[Path], wanted: NDArray[np.int64]) -> Iterator[pa.Table]:
    """Tables of up to about `SORT_BYTES`, each sorted by clip id, without repetition over all of them."""
    pending: list[pa.Table] = []
    for position, path in enumerate(files):
        pending.append(read_table(path, LATENT.names).select(LATENT.names).cast(LATENT))
        if sum(part.nbytes for part in pending) < SORT_BYTES and position + 1 < len(files):
            continue
        piece = unique(pa.concat_tables(pending), wanted)
        wanted = np.setdiff1d(wanted, piece["clip_id"].to_numpy())
        pending = []
        yield piece.sort_by("clip_id")


def _pictures(seen: pa.Table, chosen: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(clip id, JPEG of its middle) of the chosen clips whose file can still be read."""
    for row in seen.filter(pc.is_in(seen["clip_id"], pa.array(chosen, pa.int64()))).to_pylist():
        try:
            yield row["clip_id"], _picture(row)
        except Exception:  # that is why it is a reject; the page says so
            continue


def _picture(row: Mapping[str, Any]) -> bytes:
    footage = open_footage(row["uri"])
    frame = next(footage.frames_at(np.array([(row["start_s"] + row["end_s"]) / 2])))
    scale = PICTURE_SIDE / max(footage.size)
    size = max(1, round(footage.size[1] * scale)), max(1, round(footage.size[0] * scale))
    small = cv2.resize(frame[..., ::-1], size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes()
