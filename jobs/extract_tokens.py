"""Tokens of both codecs for every clip of a dataset.

Interrupt it at will and run it again: it goes on. Of a dataset that has grown, what is new is extracted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from arlon_ray import mirror
from arlon_ray.artifact import Artifact, ArtifactError, fetched, load_artifact, write_json
from arlon_ray.config import Config
from arlon_ray.models.codec import load_codec
from data_pipeline.dataset import LatentDataset, token_file
from data_pipeline.manifest import (
    MANIFEST,
    DatasetManifest,
    TokenManifest,
    differences,
    finished_manifest,
    read_manifest,
    settings_key,
    write_manifest,
)
from data_pipeline.parquet import open_parquet, read_table
from data_pipeline.schema import SCHEMA_VERSION
from data_pipeline.tokens import stray_token
from jobs.command_line import InputError, existing, output_folder, parser, read_config, run
from jobs.holding import alone
from jobs.ray_session import connect

#: The settings of a run that is under way; the finished folder has them in its manifest.
SETTINGS = ".settings.json"


@dataclass(frozen=True)
class TokenSummary:
    """What a run ended with. `skipped`: it was all there already."""

    folder: Path
    manifest: TokenManifest
    skipped: bool


def run_extract_tokens(
    config: Config, dataset: Path, fine: Path, coarse: Path, output: Path, *, overwrite: bool = False
) -> TokenSummary:
    """Write the tokens of `dataset` to `output`; nothing to do where they are there already.

    Raises ArtifactError where a codec is missing, does not fit the latents, or was trained on another VAE's; InputError
    where `output` holds tokens that were made otherwise (unless `overwrite`); BusyError while another job makes
    `output`. All of that before Ray starts, unless `output` lies in a bucket.
    """
    with alone(config, output, "tokens"):
        return _extracted(config, dataset, fine, coarse, output, overwrite)


def _extracted(config: Config, dataset: Path, fine: Path, coarse: Path, output: Path, overwrite: bool) -> TokenSummary:
    manifest = read_manifest(dataset, DatasetManifest)
    codecs = {name: load_artifact(path, "codec") for name, path in (("fine", fine), ("coarse", coarse))}
    sizes = {}
    for name, artifact in codecs.items():
        sizes[name] = _check_codec(name, artifact, dataset, manifest)
    settings: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dataset": manifest.key,
        "clips": manifest.fingerprint,
        "fine": codecs["fine"].fingerprint,
        "coarse": codecs["coarse"].fingerprint,
    }
    there = finished_manifest(output, TokenManifest)
    latents = mirror.glob(dataset / "latents", "bucket=*/*.parquet")
    files = [(path, output / token_file(path)) for path in latents]
    if there is not None and there.key == settings_key(settings) and not _missing(files, sizes):
        return TokenSummary(output, there, skipped=True)
    _prepare(output, there, settings, overwrite)
    missing = _missing(files, sizes)
    total = sum(open_parquet(source).metadata.num_rows for source, _ in missing)
    with connect(config):
        # imported once Ray is there: it takes seconds, and bad input must not wait for it
        from data_pipeline.ray_pipeline import extract_all_tokens

        device = "cuda" if config.data.encoder_gpus else "cpu"
        extract_all_tokens(missing, fine, coarse, config, device, total)
    result = TokenManifest(
        schema_version=SCHEMA_VERSION,
        key=settings_key(settings),
        settings=settings,
        fingerprint=settings_key(settings),
        vae_fingerprint=manifest.vae_fingerprint,
        rows=sum(open_parquet(target).metadata.num_rows for _, target in files),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dataset_fingerprint=manifest.fingerprint,
        fine_fingerprint=codecs["fine"].fingerprint,
        coarse_fingerprint=codecs["coarse"].fingerprint,
        fine_codebook_size=sizes["fine"],
        coarse_codebook_size=sizes["coarse"],
    )
    if result.rows != manifest.rows:
        raise ArtifactError(
            f"{dataset}: {result.rows} latent rows, but {manifest.rows} in its manifest: preprocess again"
        )
    write_manifest(output, result)
    mirror.remove(output / SETTINGS)
    LatentDataset(dataset, tokens=output)
    return TokenSummary(output, result, skipped=False)


def _missing(files: list[tuple[Path, Path]], sizes: dict[str, int]) -> list[tuple[Path, Path]]:
    """The (latent file, token file) whose tokens are not there, or damaged."""
    return [(latents, tokens) for latents, tokens in files if not _belongs(tokens, latents, sizes)]


def _belongs(tokens: Path, latents: Path, sizes: dict[str, int]) -> bool:
    """Whether a token file is there, whole, and holds the clips of a latent file, in their order."""
    try:
        if not mirror.exists(tokens):
            return False
        table, clips = read_table(tokens), read_table(latents, ["clip_id"])["clip_id"]
        return table["clip_id"].equals(clips) and all(stray_token(table, *each) is None for each in sizes.items())
    except (OSError, pa.ArrowInvalid, KeyError):
        return False


def _check_codec(name: str, artifact: Artifact, dataset: Path, manifest: DatasetManifest) -> int:
    """The codebook's size. Raises ArtifactError unless the codec fits the dataset's latents."""
    trained_on = artifact.lineage.parents.get("vae")
    if trained_on is not None and trained_on != manifest.vae_fingerprint:
        raise ArtifactError(
            f"{name} codec {artifact.path} was trained on latents of VAE {trained_on[:12]}…, but dataset {dataset} was "
            f"encoded by VAE {manifest.vae_fingerprint[:12]}…: train the codec on this dataset"
        )
    codec = load_codec(artifact.path)
    if codec.latent_channels != manifest.latent_channels:
        raise ArtifactError(
            f"{name} codec {artifact.path} is for {codec.latent_channels} latent channels, dataset {dataset} has "
            f"{manifest.latent_channels}"
        )
    return codec.config.codebook_size


def _prepare(output: Path, there: TokenManifest | None, settings: dict[str, Any], overwrite: bool) -> None:
    """Make `output` ready to go on with these settings. Raises InputError if it was begun with others."""
    marker = fetched(output / SETTINGS)
    other = there.settings if there is not None else None
    if other is None and marker.exists():
        try:
            other = json.loads(marker.read_text())
        except (OSError, ValueError):
            other = None
    if other is not None and _but_clips(other) == _but_clips(settings):
        # the same run, or a dataset that has grown since: files of clips that are still there stay
        mirror.remove(output / MANIFEST)
        write_json(marker, settings)
        return
    if other is not None and not overwrite:
        raise InputError(
            f"{output}: holds tokens made otherwise: {differences(other, settings)}; "
            "choose another --output, or --overwrite it"
        )
    # only what this job writes: the folder may be the user's own
    for path in [output / MANIFEST, *mirror.glob(output, "*.parquet")]:
        mirror.remove(path)
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)


def _but_clips(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "clips"}


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="DATASET/tokens")
    flags.add_argument("--dataset", required=True, metavar="DIR", help="dataset made by jobs/preprocess.py")
    flags.add_argument("--codec-fine", required=True, metavar="DIR", help="fine codec's artefact")
    flags.add_argument("--codec-coarse", required=True, metavar="DIR", help="coarse codec's artefact")
    flags.add_argument("--overwrite", action="store_true", help="replace tokens that were made otherwise")
    flags.set_defaults(output=None)
    arguments = flags.parse_args()
    config = read_config(arguments)
    dataset = existing(arguments.dataset, "--dataset")
    fine, coarse = existing(arguments.codec_fine, "--codec-fine"), existing(arguments.codec_coarse, "--codec-coarse")
    output = output_folder(arguments) if arguments.output else dataset / "tokens"
    summary = run_extract_tokens(config, dataset, fine, coarse, output, overwrite=arguments.overwrite)
    manifest = summary.manifest
    where = mirror.named(str(summary.folder))
    print(
        f"{where}: {'was there already' if summary.skipped else 'done'}, tokens of {manifest.rows} clips "
        f"(codebooks {manifest.fine_codebook_size} fine, {manifest.coarse_codebook_size} coarse)"
    )


if __name__ == "__main__":
    run(main)
