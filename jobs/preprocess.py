"""Raw video → clips → VAE latents and text embeddings, as a Parquet dataset.

Interrupt it at will and run it again: it goes on. Run it again on an input that has grown: what is new is appended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError, load_artifact
from arlon_ray.config import Config, FilterConfig
from arlon_ray.models.text import text_identity
from data_pipeline.buckets import shapes
from data_pipeline.captioners import check_captioner
from data_pipeline.collection import Plan, empty_collection, plan, read_collection, source_rows
from data_pipeline.finish import (
    described,
    make_ready,
    merged,
    publish,
    report_of,
    write_latents,
    write_rejects,
)
from data_pipeline.manifest import MANIFEST, DatasetManifest, differences, finished_manifest, settings_key
from data_pipeline.report import format_report
from data_pipeline.schema import SCHEMA_VERSION
from data_pipeline.sources import SourceFile, find_sources
from data_pipeline.staging import WORK, Staging
from jobs.command_line import InputError, collection, existing, output_folder, parser, read_config, run, vae_folder
from jobs.holding import alone
from jobs.ray_session import connect

#: Clips of one part of the work, which is a task of Ray's; more where there would be more parts than Ray handles well.
PART_CLIPS, MOST_PARTS = 16, 20_000
#: Times that the encoders are started for clips that are still missing (a killed writer loses its file).
ROUNDS = 3
#: What the work folder notes beside the settings: the files and clips that it is about.
WORK_KEY = "work"


@dataclass(frozen=True)
class DatasetSummary:
    """What a run ended with. `skipped`: it was all there already."""

    folder: Path
    manifest: DatasetManifest
    skipped: bool


def dataset_settings(config: Config, vae: str, text: str) -> dict[str, Any]:
    """All but the input that determines the dataset's content, by name; its sha256 is the dataset's key."""
    data = config.data
    return {
        "schema_version": SCHEMA_VERSION,
        "video": str(config.video),
        "bucket_groups": sorted(set(data.bucket_groups)),
        "aspect_ratios": list(data.aspect_ratios),
        "stride_groups": data.stride_groups,
        "shots": [data.shots, data.shot_threshold],
        **filter_settings(data.filters),
        "captioner": [data.captioner, settings_key(data.captioner_options)] if data.captioner else None,
        "max_clips_per_video": data.max_clips_per_video,
        "vae": vae,
        "vae.tile": config.vae.tile,
        "text": text,
        "text.max_tokens": config.text.max_tokens,
    }


def filter_settings(filters: FilterConfig) -> dict[str, Any]:
    """The thresholds as settings of a dataset, "filters.max_black" and so on."""
    return {f"filters.{name}": value for name, value in filters.model_dump().items()}


def run_preprocess(
    config: Config,
    source: str | Path,
    output: Path,
    *,
    vae: Path | None = None,
    overwrite: bool = False,
    retry_rejects: bool = False,
) -> DatasetSummary:
    """Make the dataset `output` of the videos in `source`, or append to it what is new; skipped where nothing is.

    `vae` is the VAE artefact (default: `vae.init` of the configuration). `retry_rejects` tries the failures of a
    dataset again, and nothing that is in it. Raises InputError where there are no videos, or where `output` holds a
    dataset that was made with other settings (unless `overwrite`); ArtifactError where the VAE, the text encoder or the
    captioner cannot be used, or where the input lacks what the dataset was made of; BusyError while another job makes
    `output`. All of that before Ray starts, unless `output` lies in a bucket.
    """
    vae_path = vae_folder(str(vae) if vae else None, config)
    text = text_identity(config.text)
    shapes(config.video, config.data)
    if config.data.captioner is not None:
        check_captioner(config.data.captioner, config.data.captioner_options)
    settings = dataset_settings(config, load_artifact(vae_path, "vae").fingerprint, text)
    sources = find_sources(source, config.data)
    if not sources:
        raise InputError(f"--input {source}: no video files (.mp4, .mkv, .webm, …)")
    with alone(config, output, "dataset"):
        return _made(config, sources, output, settings, vae_path, overwrite, retry_rejects)


def _made(
    config: Config,
    sources: list[SourceFile],
    output: Path,
    settings: dict[str, Any],
    vae_path: Path,
    overwrite: bool,
    retry_rejects: bool,
) -> DatasetSummary:
    staging = Staging(output)
    _refuse_other_settings(output, staging, settings, overwrite)
    if (staging.ready / MANIFEST).is_file():
        publish(staging, output)

    files = settings_key({"files": [[s.name, s.size, s.identity, s.caption.said] for s in sources]})
    there = finished_manifest(output, DatasetManifest)
    if there is not None and there.input == files and not retry_rejects:
        return DatasetSummary(output, there, skipped=True)
    todo = _plan(output, there, sources, retry_rejects, overwrite)
    if there is not None and not todo.search:
        return DatasetSummary(output, there, skipped=True)
    _begin(staging, settings, todo)
    with connect(config):
        _encode(config, staging, todo, vae_path)
    return DatasetSummary(output, _finish(config, staging, output, todo, settings, files), skipped=False)


def _plan(output: Path, there: DatasetManifest | None, sources: list[SourceFile], retry: bool, overwrite: bool) -> Plan:
    """What is to be done with these files. Raises ArtifactError unless `overwrite`, which then makes all anew."""
    if there is None:
        return plan(sources, empty_collection(), retry)
    try:
        return plan(sources, read_collection(output), retry)
    except ArtifactError:
        if not overwrite:
            raise
    _clear(output)
    return plan(sources, empty_collection(), retry)


def _begin(staging: Staging, settings: dict[str, Any], todo: Plan) -> None:
    """Make the work folder fit what is to be done; what it holds of that already stays."""
    work = {
        "files": [[s.name, s.identity, s.caption.said, s.caption.error] for s in todo.search],
        "not": sorted(todo.settled),
    }
    wanted = {**settings, WORK_KEY: settings_key(work)}
    under_way = staging.settings()
    if under_way is None or _recipe(under_way) != settings:
        staging.start(wanted)
    elif under_way != wanted:
        staging.search_again(wanted)


def _recipe(under_way: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in under_way.items() if name != WORK_KEY}


def _encode(config: Config, staging: Staging, todo: Plan, vae: Path) -> None:
    """All of it that runs on Ray: find the clips, then encode those that are not encoded yet."""
    # imported once Ray is there: it takes seconds, and bad input must not wait for it
    from data_pipeline.ray_pipeline import encode_clips, find_all_clips

    if not staging.clips.exists():
        staging.write_clips(find_all_clips(staging, todo.search, config), todo.settled)
    total = len(staging.read_clips())
    for _ in range(ROUNDS):
        pending = staging.pending(max(PART_CLIPS, -(-total // MOST_PARTS)))
        if not pending:
            return
        encode_clips(staging, pending, config, vae, _device(config), total)


def _refuse_other_settings(output: Path, staging: Staging, settings: dict[str, Any], overwrite: bool) -> None:
    """Raise InputError if `output` belongs to a run with other settings; with `overwrite`, clear it instead."""
    there, under_way = finished_manifest(output, DatasetManifest), staging.settings()
    other = there.settings if there is not None else _recipe(under_way) if under_way is not None else None
    if other is None or other == settings:
        return
    if not overwrite:
        raise InputError(
            f"{output}: holds a dataset made with other settings: {differences(other, settings)}; "
            "choose another --output, or --overwrite it"
        )
    _clear(output)


def _clear(output: Path) -> None:
    # the manifest goes first: without it nothing takes what is left for a finished dataset
    for name in (MANIFEST, "latents", "tokens", WORK):
        mirror.remove(output / name)


def _finish(
    config: Config, staging: Staging, output: Path, todo: Plan, settings: dict[str, Any], files: str
) -> DatasetManifest:
    """Turn the work folder into the finished dataset."""
    merge = merged(staging, todo.before, source_rows(todo.search), config.data.filters.near_duplicate_bits)
    report = report_of(merge)
    print(format_report(report), flush=True)
    if not report["total"]["kept"]:
        write_rejects(output, merge, report)
        raise InputError(f"no clip could be used, see {output / 'rejects.parquet'}; the reasons are listed above")
    facts = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        key=settings_key(settings),
        settings=settings,
        input=files,
        vae_fingerprint=settings["vae"],
        text_identity=settings["text"],
        text_dim=config.text.dim,
        text_max_tokens=config.text.max_tokens,
        latent_channels=config.vae.latent_channels,
    )
    manifest, ids = described(merge, facts), merge.kept["clip_id"].to_numpy()
    make_ready(
        staging,
        merge,
        report,
        manifest,
        lambda folder: write_latents(staging, ids, folder, config.data.row_group, output / "latents"),
    )
    publish(staging, output)
    return manifest


def _device(config: Config) -> str:
    """Where an encoder actor computes: a GPU only if it is given one."""
    return "cuda" if config.data.encoder_gpus else "cpu"


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/dataset")
    flags.add_argument(
        "--input",
        required=True,
        metavar="INPUT",
        help="videos: a folder, a file, a pattern in quotes ('videos/**/*.mp4'), or a list (.csv, .jsonl, .parquet) "
        "with a column `path`, here or remote (s3://, gs://, hdfs://); captions from its column `caption`, or .txt or "
        ".json beside each file",
    )
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init of the configuration)")
    flags.add_argument("--overwrite", action="store_true", help="replace a dataset that was made with other settings")
    flags.add_argument(
        "--retry-rejects", action="store_true", help="try again what failed or had no caption, and nothing else"
    )
    arguments = flags.parse_args()
    config = read_config(arguments)
    source = collection(arguments.input, "--input")
    output = output_folder(arguments)
    vae = existing(arguments.vae, "--vae") if arguments.vae is not None else None
    summary = run_preprocess(
        config, source, output, vae=vae, overwrite=arguments.overwrite, retry_rejects=arguments.retry_rejects
    )
    manifest = summary.manifest
    state = "was there already" if summary.skipped else "done"
    buckets = ", ".join(f"{name}: {rows}" for name, rows in manifest.buckets.items())
    where = mirror.named(str(summary.folder))
    print(f"{where}: {state}, {manifest.rows} clips ({buckets}), {manifest.rejects} rejects")


if __name__ == "__main__":
    run(main)
