"""Stage artefacts: a folder of `config.json`, `model.safetensors` and `lineage.json`, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from arlon_ray import __version__, mirror

WEIGHTS, CONFIG, LINEAGE = "model.safetensors", "config.json", "lineage.json"


class ArtifactError(ValueError):
    """An artefact that is missing, damaged, or does not fit the others. One line that names it."""


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([*([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


@dataclass(frozen=True)
class Lineage:
    """Where an artefact comes from. `parents` maps a role ("vae", "dataset", …) to that artefact's fingerprint."""

    kind: str
    fingerprint: str
    parents: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    key: str = ""
    code_version: str = __version__
    created: str = ""


@dataclass(frozen=True)
class Artifact:
    """One stage's result on disk."""

    path: Path
    config: dict[str, Any]
    lineage: Lineage

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the weights."""
        return self.lineage.fingerprint

    def tensors(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, whole: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """The weights, in `dtype` where they are floating point; those named in `whole` in float32."""
        try:
            stored = load_file(self.path / WEIGHTS, device=str(device))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.path / WEIGHTS}: cannot be read: {error}") from None
        return {
            name: value.to(torch.float32 if name in whole else dtype) if value.is_floating_point() else value
            for name, value in stored.items()
        }


#: Seconds after a change within which another one may leave a file's times as they are.
_SETTLED_S = 2.0


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file; kept while its content cannot have changed, by inode, size and times of change."""
    seen = path.stat()
    if time.time() - seen.st_ctime < _SETTLED_S:
        return _read_sha256(path)
    return _kept_sha256(path, (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns))


@lru_cache(maxsize=256)
def _kept_sha256(path: Path, state: tuple[int, ...]) -> str:
    return _read_sha256(path)


def _read_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends, and vanishes if it raises.

    Where `path` stands for a folder of a bucket (`mirror`), that is written as well. `path` may be its URI.
    """
    target = mirror.local(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        mirror.push(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that a reader sees the old file or the new one, never half of it; also in a bucket."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)
    mirror.push(path)


def save_artifact(
    path: str | Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parents: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    key: str = "",
    dtype: torch.dtype | None = None,
) -> Artifact:
    """Write an artefact, atomically, in place of what was at `path`; floating-point tensors in `dtype`, if given.

    `key` is the fingerprint of all that determined the result (settings and parents): equal key, nothing to redo.
    """
    with whole_folder(path) as folder:
        stored = {
            name: (value.to(dtype) if dtype and value.is_floating_point() else value).detach().cpu().contiguous()
            for name, value in tensors.items()
        }
        save_file(stored, folder / WEIGHTS)
        let_others_read(folder / WEIGHTS)
        lineage = record(folder, kind=kind, config=config, parents=parents, metrics=metrics, key=key)
    return Artifact(mirror.local(path), dict(config), lineage)


def let_others_read(path: Path) -> None:
    """Give a file the mode of any new file here: safetensors writes files that only their owner may read."""
    other = path.with_name(f".{path.name}.mode")
    other.touch()
    shutil.copymode(other, path)
    other.unlink()


def record(
    folder: Path,
    *,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    key: str = "",
) -> Lineage:
    """Make an artefact of a new folder that holds the weights: write its configuration and its lineage."""
    lineage = Lineage(
        kind=kind,
        fingerprint=sha256_of(folder / WEIGHTS),
        parents=dict(parents or {}),
        metrics={name: float(value) for name, value in (metrics or {}).items()},
        key=key,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_json(folder / CONFIG, dict(config))
    write_json(folder / LINEAGE, lineage.__dict__)
    return lineage


def load_artifact(path: str | Path, kind: str, *, verify: bool = True) -> Artifact:
    """Open an artefact of `kind`, in a folder or a bucket; `verify` compares the weights with their recorded sha256.

    Raises ArtifactError where a part is missing, damaged, of another kind, or not what the lineage says.
    """
    folder = fetched(path)
    for name in (CONFIG, LINEAGE, WEIGHTS):
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder}: not a {kind} artefact: {name} is missing")
    config, lineage = read_object(folder / CONFIG), _read_lineage(folder)
    if lineage.kind != kind:
        raise ArtifactError(f"{folder}: expected a {kind} artefact, found {lineage.kind}")
    try:
        found = sha256_of(folder / WEIGHTS) if verify else lineage.fingerprint
    except OSError as error:
        raise ArtifactError(f"{folder / WEIGHTS}: cannot be read: {error}") from None
    if found != lineage.fingerprint:
        raise ArtifactError(
            f"{folder / WEIGHTS}: sha256 {found[:12]}… is not the recorded {lineage.fingerprint[:12]}…: "
            "the file was changed or cut short; copy or train it again"
        )
    return Artifact(folder, config, lineage)


def fetched(path: str | Path) -> Path:
    """A folder or file as it is in its bucket; others as they are. Raises ArtifactError where it cannot be reached."""
    try:
        return mirror.pull(mirror.local(path))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {one_line(error)}") from None


class Uninitialised(TorchFunctionMode):
    """`nn.init` and drawing in place do nothing: on the meta device, where they only waste time, the first draw imports
    torch's compiler, which takes longer than loading a small bundle.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def building(artifact: Artifact) -> Iterator[None]:
    """Around making a model of an artefact: settings and weights that do not fit end in one ArtifactError.

    Weights are moved to their device outside of it: a device out of memory is no fault of the artefact. Within it
    parameters are not initialised: they are replaced by what was stored.
    """
    try:
        with Uninitialised():
            yield
    except ArtifactError:
        raise
    except (KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ArtifactError(
            f"{artifact.path}: no {artifact.lineage.kind} can be made of its {CONFIG} and {WEIGHTS}: {one_line(error)}"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises ArtifactError if it cannot be read or holds anything else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path.parent}: damaged {path.name}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ArtifactError(f"{path.parent}: damaged {path.name}: expected an object, found {type(value).__name__}")
    return value


def _read_lineage(folder: Path) -> Lineage:
    try:
        lineage = Lineage(**read_object(folder / LINEAGE))
    except TypeError as error:
        raise ArtifactError(f"{folder}: damaged {LINEAGE}: {one_line(error)}") from None
    texts = [lineage.kind, lineage.fingerprint, lineage.key]
    if isinstance(lineage.parents, dict):
        texts += lineage.parents.values()
    if not isinstance(lineage.parents, dict) or not all(isinstance(text, str) for text in texts):
        raise ArtifactError(f"{folder}: damaged {LINEAGE}: kind, fingerprint, key and parents must be text")
    return lineage


def finished(path: str | Path, kind: str, key: str) -> Artifact | None:
    """The artefact at `path` if it is whole, of `kind`, and was made with exactly this `key`; else None."""
    try:
        artifact = load_artifact(path, kind)
    except ArtifactError:
        return None
    return artifact if artifact.lineage.key == key else None
