"""Raw video → clips → VAE latents and text embeddings, as a Parquet dataset. Interrupt it at will; rerun to go on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.artifact import load_artifact, write_json
from arlon_ray.config import Config
from arlon_ray.models.text import text_identity
from data_pipeline.manifest import (
    MANIFEST,
    DatasetManifest,
    dataset_fingerprint,
    differences,
    finished_manifest,
    settings_key,
    write_manifest,
)
from data_pipeline.report import build_report, format_report
from data_pipeline.schema import REJECTED_BUCKET, SCHEMA_VERSION
from data_pipeline.sources import SourceFile, find_sources
from data_pipeline.staging import Staging, write_latents, write_table
from jobs.command_line import InputError, collection, existing, output_folder, parser, read_config, run, vae_folder
from jobs.ray_session import connect

#: Clips of one part of the work: what a reader takes at once.
PART_CLIPS = 64


@dataclass(frozen=True)
class DatasetSummary:
    """What a run ended with. `skipped`: it was all there already."""

    folder: Path
    manifest: DatasetManifest
    skipped: bool


def dataset_settings(config: Config, sources: list[SourceFile], vae: str, text: str) -> dict[str, Any]:
    """All that determines the dataset's content, by name; its sha256 is the dataset's key."""
    files = [[source.name, source.size, source.identity, source.caption] for source in sources]
    return {
        "schema_version": SCHEMA_VERSION,
        "input": settings_key({"files": files}),
        "video": str(config.video),
        "bucket_groups": sorted(set(config.data.bucket_groups)),
        "max_clips_per_video": config.data.max_clips_per_video,
        "vae": vae,
        "vae.tile": config.vae.tile,
        "text": text,
        "text.max_tokens": config.text.max_tokens,
    }


def run_preprocess(
    config: Config, source: Path, output: Path, *, vae: Path | None = None, overwrite: bool = False
) -> DatasetSummary:
    """Make the dataset `output` of the videos in `source`; nothing to do where it is there already.

    `vae` is the VAE artefact (default: `vae.init` of the configuration). Raises InputError where there are no videos,
    or where `output` holds a dataset that was made with other settings (unless `overwrite`); ArtifactError where the
    VAE or the text encoder cannot be used. All of that before Ray starts.
    """
    vae_path = vae_folder(str(vae) if vae else None, config)
    vae_fingerprint = load_artifact(vae_path, "vae").fingerprint
    sources = find_sources(source, config.data)
    if not sources:
        raise InputError(f"--input {source}: no video files (.mp4, .mkv, .webm, …)")
    text = text_identity(config.text)
    settings = dataset_settings(config, sources, vae_fingerprint, text)
    key = settings_key(settings)
    staging = Staging(output)
    there = finished_manifest(output, DatasetManifest)
    if there is not None and there.key == key:
        return DatasetSummary(output, there, skipped=True)
    _refuse_other_settings(output, staging, there, settings, overwrite)

    (output / MANIFEST).unlink(missing_ok=True)
    if staging.settings() != settings:
        staging.start(settings)
    with connect(config):
        _encode(config, staging, sources, vae_path)
    manifest = _finish(config, staging, output, sources, settings, vae_fingerprint, text)
    return DatasetSummary(output, manifest, skipped=False)


def _encode(config: Config, staging: Staging, sources: list[SourceFile], vae: Path) -> None:
    """All of it that runs on Ray: find the clips, then encode those that are not encoded yet."""
    # imported once Ray is there: it takes seconds, and bad input must not wait for it
    from data_pipeline.ray_pipeline import encode_clips, find_all_clips

    if not staging.rejects.exists():
        clips, rejects = find_all_clips(sources, config)
        staging.write_clips(clips, rejects, PART_CLIPS)
    total = len(staging.read_clips())
    if total:
        encode_clips(staging, config, vae, _device(config), total)


def _refuse_other_settings(
    output: Path, staging: Staging, there: DatasetManifest | None, settings: dict[str, Any], overwrite: bool
) -> None:
    """Raise InputError if `output` belongs to a run with other settings; with `overwrite`, clear it instead."""
    under_way = staging.settings()
    other = there.settings if there is not None else under_way
    if overwrite:
        if other is not None and other != settings:
            # the manifest goes first: without it nothing takes what is left for a finished dataset
            (output / MANIFEST).unlink(missing_ok=True)
            for name in ("latents", "tokens"):
                shutil.rmtree(output / name, ignore_errors=True)
        return
    if other is not None and other != settings:
        raise InputError(
            f"{output}: holds a dataset made with other settings: {differences(other, settings)}; "
            "choose another --output, or --overwrite it"
        )


def _finish(
    config: Config,
    staging: Staging,
    output: Path,
    sources: list[SourceFile],
    settings: dict[str, Any],
    vae_fingerprint: str,
    text: str,
) -> DatasetManifest:
    """Turn the work folder into the finished dataset; its manifest comes last."""
    clips, rejects = staging.read_clips(), staging.all_rejects()
    rejected = [value for value in rejects["clip_id"].to_pylist() if value is not None]
    kept = clips.filter(np.isin(clips["clip_id"].to_numpy(), np.array(rejected, np.int64), invert=True))
    report = build_report(
        [source.name for source in sources],
        clips["source"].to_pylist(),
        kept["source"].to_pylist(),
        rejects.to_pylist(),
    )
    write_table(clips, output / "manifest.parquet")
    write_table(rejects, output / "rejects.parquet")
    write_json(output / "report.json", report)
    print(format_report(report), flush=True)
    if not len(kept):
        raise InputError(f"no clip could be used, see {output / 'rejects.parquet'}; the reasons are listed above")
    buckets = set(clips["bucket"].to_pylist()) - {REJECTED_BUCKET}
    counts = write_latents(staging, buckets, output / "latents", config.data.row_group)
    if sum(counts.values()) != len(kept):
        raise RuntimeError(f"{len(kept)} clips were to be kept, {sum(counts.values())} were written: run it again")
    manifest = DatasetManifest(
        schema_version=SCHEMA_VERSION,
        key=settings_key(settings),
        settings=settings,
        fingerprint=dataset_fingerprint(kept["clip_id"].to_numpy(), settings_key(settings)),
        vae_fingerprint=vae_fingerprint,
        rows=len(kept),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        text_identity=text,
        text_dim=config.text.dim,
        text_max_tokens=config.text.max_tokens,
        latent_channels=config.vae.latent_channels,
        buckets=counts,
        rejects=len(rejects),
    )
    write_manifest(output, manifest)
    staging.remove()
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
        "with a column `path`; captions from its column `caption`, or .txt or .json beside each file",
    )
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init of the configuration)")
    flags.add_argument("--overwrite", action="store_true", help="replace a dataset that was made with other settings")
    arguments = flags.parse_args()
    config = read_config(arguments)
    source = collection(arguments.input, "--input")
    output = output_folder(arguments)
    vae = existing(arguments.vae, "--vae") if arguments.vae is not None else None
    summary = run_preprocess(config, source, output, vae=vae, overwrite=arguments.overwrite)
    manifest = summary.manifest
    state = "was there already" if summary.skipped else "done"
    buckets = ", ".join(f"{name}: {rows}" for name, rows in manifest.buckets.items())
    print(f"{summary.folder}: {state}, {manifest.rows} clips ({buckets}), {manifest.rejects} rejects")


if __name__ == "__main__":
    run(main)
