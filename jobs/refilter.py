"""A dataset with stricter filters, from the scores of another: nothing is decoded or encoded again.

`python jobs/refilter.py --dataset DIR --output DIR --set data.filters.min_motion=0.02`

The result is what jobs/preprocess.py would make with these filters; what it left out is in `rejects.parquet`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from arlon_ray import mirror
from arlon_ray.config import FilterConfig
from data_pipeline.collection import Collection, read_collection
from data_pipeline.finish import described, make_ready, publish, reject_duplicates, report_of
from data_pipeline.manifest import MANIFEST, DatasetManifest, read_manifest, settings_key
from data_pipeline.parquet import open_parquet, write_table
from data_pipeline.report import format_report
from data_pipeline.schema import REJECT, SEEN, STAGE_CLIPS, STAGE_FILTER, Row, reject_row
from data_pipeline.scores import CLIP_THRESHOLDS, FILE_THRESHOLDS, judge
from data_pipeline.staging import Staging
from jobs.command_line import InputError, existing, output_folder, parser, read_config, run
from jobs.preprocess import filter_settings


def run_refilter(filters: FilterConfig, dataset: Path, output: Path) -> DatasetManifest:
    """Write `dataset` with `filters` besides its own to `output`.

    Raises InputError where a filter is looser than the dataset's (what it left out was never encoded), needs a score
    that was not measured, leaves nothing, or where `output` holds a dataset; ArtifactError where `dataset` is none.
    """
    there = read_manifest(dataset, DatasetManifest)
    if mirror.exists(output / MANIFEST):
        raise InputError(f"{output}: holds a dataset already: choose another --output")
    strict = _with_its_own(filters, there)
    before = read_collection(dataset)
    if strict.max_text is not None and before.kept["text"].null_count:
        raise InputError(f"{dataset}: its text was not measured: preprocess with data.filters.max_text set")
    merge = refiltered(before, strict)
    report = report_of(merge)
    print(format_report(report), flush=True)
    if not len(merge.kept):
        raise InputError("these filters leave no clip; the reasons are listed above")
    settings = {**there.settings, **filter_settings(strict)}
    manifest = described(merge, there.model_copy(update={"settings": settings, "key": settings_key(settings)}))
    staging, ids = Staging(output), merge.kept["clip_id"].to_numpy()
    staging.start(settings)
    make_ready(staging, merge, report, manifest, lambda folder: _write_parts(dataset / "latents", folder, ids))
    publish(staging, output)
    return manifest


def refiltered(before: Collection, filters: FilterConfig) -> Collection:
    """The tables of a dataset once `filters` are applied to what is in it; nothing comes back in."""
    order = [("source", "ascending"), ("start_s", "ascending")]
    rows: list[Row] = [{**row, "stage": "", "error": ""} for row in before.seen.sort_by(order).to_pylist()]
    # a file that is too short or too small has no clips at all: it is one reject, as if it had not been searched
    files: dict[str, Row] = {}
    for row in rows:
        reason, error = judge(row, filters, FILE_THRESHOLDS)
        if reason:
            files[row["source"]] = reject_row(row["source"], STAGE_CLIPS, reason, error)
    kept = [row for row in rows if not row["reason"] and row["source"] not in files]
    for row in kept:
        reason, error = judge(row, filters, CLIP_THRESHOLDS)
        row.update(stage=STAGE_FILTER if reason else "", reason=reason, error=error)
    if filters.near_duplicate_bits is not None:
        reject_duplicates(kept, SEEN.empty_table(), filters.near_duplicate_bits)
    rejects = [row for row in before.rejects.to_pylist() if row["source"] not in files]
    rejects += [{name: row[name] for name in REJECT.names} for row in kept if row["reason"]]
    rejects += files.values()
    return Collection(
        sources=before.sources,
        seen=pa.Table.from_pylist([row for row in rows if row["source"] not in files], SEEN),
        rejects=pa.Table.from_pylist(rejects, REJECT).sort_by(order),
    )


def _with_its_own(filters: FilterConfig, there: DatasetManifest) -> FilterConfig:
    """The thresholds, with the dataset's own where none is given. Raises InputError for a looser one."""
    chosen: dict[str, Any] = {}
    for name, value in filters.model_dump().items():
        own = there.settings.get(f"filters.{name}")
        # lowest thresholds rise, highest fall; more bits make more clips near-duplicates
        stricter = own is None or value is None or (value <= own if name.startswith("max_") else value >= own)
        if not stricter:
            raise InputError(
                f"data.filters.{name}={value:g} is looser than the dataset's own {own:g}: what that left out was never "
                "encoded; preprocess with the looser one"
            )
        chosen[name] = own if value is None else value
    return FilterConfig(**chosen)


def _write_parts(source: Path, target: Path, ids: np.ndarray) -> None:
    """Copy the rows of these clips, part by part, in row groups of the same size."""
    for path in mirror.glob(source, "bucket=*/*.parquet"):
        file = open_parquet(path)
        table = file.read()
        chosen = table.filter(pa.array(np.isin(table["clip_id"].to_numpy(), ids)))
        if len(chosen):
            (target / path.parent.name).mkdir(parents=True, exist_ok=True)
            write_table(chosen, target / path.parent.name / path.name, file.metadata.row_group(0).num_rows)


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/refiltered")
    flags.add_argument("--dataset", required=True, metavar="DIR", help="dataset made by jobs/preprocess.py")
    arguments = flags.parse_args()
    filters = read_config(arguments).data.filters
    if not any(value is not None for value in filters.model_dump().values()):
        raise InputError("no filter is set: name one with --set data.filters.NAME=VALUE")
    output = output_folder(arguments)
    manifest = run_refilter(filters, existing(arguments.dataset, "--dataset"), output)
    print(f"{output}: done, {manifest.rows} clips, {manifest.rejects} rejects; extract the tokens of it next")


if __name__ == "__main__":
    run(main)
