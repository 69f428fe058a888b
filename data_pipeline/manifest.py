"""`manifest.json` of a dataset and of its tokens: what they were made from. Written last: where it is, all is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from arlon_ray.artifact import ArtifactError, fetched, write_json
from data_pipeline.schema import SCHEMA_VERSION

MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    #: Fingerprint of all that determined the content; equal key, nothing to redo.
    key: str
    #: The settings that the key is made of, by name, so that a difference can be named.
    settings: dict[str, Any]
    #: Identity of the content, for the lineage of what is trained on it.
    fingerprint: str = ""
    vae_fingerprint: str
    rows: int = 0
    created: str = ""


class DatasetManifest(_Manifest):
    """A dataset of latent rows. `buckets`: rows by bucket ("34x64x64"). `input`: key of the files it was made from."""

    input: str
    text_identity: str
    text_dim: int
    text_max_tokens: int
    latent_channels: int
    buckets: dict[str, int] = {}
    rejects: int = 0


class TokenManifest(_Manifest):
    """Tokens of a dataset, made by two codecs."""

    dataset_fingerprint: str
    fine_fingerprint: str
    coarse_fingerprint: str
    fine_codebook_size: int
    coarse_codebook_size: int


Kind = TypeVar("Kind", bound=_Manifest)


def settings_key(settings: dict[str, Any]) -> str:
    """sha256 (hex) of settings that JSON can hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The settings in which two sets differ, with short values: "fps (16.0 → 8.0), vae (1a2b… → 3c4d…)"."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name} ({_short(old.get(name))} → {_short(new.get(name))})" for name in names)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def dataset_fingerprint(clip_ids: NDArray[np.int64], key: str, captions: Sequence[str], given: Sequence[int]) -> str:
    """sha256 (hex) over the clips kept, their captions and `given_frames`, and the settings' key: shapes, VAE, text
    encoder, filters.
    """
    digest = hashlib.sha256()
    for row in np.argsort(clip_ids).tolist():
        digest.update(int(clip_ids[row]).to_bytes(8, "little") + captions[row].encode() + b"\0")
        digest.update(given[row].to_bytes(4, "little"))
    digest.update(key.encode())
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: _Manifest) -> None:
    """Write `manifest.json` into `folder`, atomically."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: str | Path, kind: type[Kind]) -> Kind:
    """The manifest in `folder`. Raises ArtifactError if it is missing, damaged, or of another schema version."""
    path = fetched(Path(folder) / MANIFEST)
    what = "dataset" if kind is DatasetManifest else "token set"
    if not path.is_file():
        raise ArtifactError(f"{folder}: not a finished {what}: {MANIFEST} is missing")
    try:
        raw = json.loads(path.read_text())
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(raw, dict) and version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}: make the {what} again"
            )
        return kind.model_validate(raw)
    except (OSError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise ArtifactError(f"{path}: damaged: {message}") from None


def finished_manifest(folder: str | Path, kind: type[Kind]) -> Kind | None:
    """The manifest in `folder`, or None where there is no usable one."""
    try:
        return read_manifest(folder, kind)
    except ArtifactError:
        return None
