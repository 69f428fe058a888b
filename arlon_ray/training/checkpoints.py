"""Where the checkpoints of a training lie."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from arlon_ray.artifact import whole_folder, write_json
from arlon_ray.training.state import SavedState

PROGRESS_FILE, CHECKSUM = "progress.json", "crc32"
KEPT_CHECKPOINTS = 2


def is_whole(folder: Path) -> bool:
    """Whether every worker's file is there and can be opened."""
    try:
        SavedState(folder)
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(read_progress(folder))


class Checkpoints(Protocol):
    """Where checkpoints are kept. Every rank calls `write` for the same steps."""

    def newest_first(self) -> Iterable[Path]:
        """Folders of whole checkpoints of this run, the newest first."""

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float], *, wait: bool) -> Path:
        """Keep what `fill` writes into the empty folder that it is given; returns where it lies.

        With `wait` it lies there when this returns; else it may still be on its way.
        """


class FolderCheckpoints:
    """Checkpoints of one process in a folder; each appears whole or not at all, and the newest two are kept."""

    def __init__(self, folder: Path, key: str = "") -> None:
        self.folder, self.key = folder, key

    def newest_first(self) -> list[Path]:
        """See Checkpoints. Those of another key (other settings or parents) do not count."""
        return [path for path in self._all() if read_progress(path).get("key") == self.key]

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float], *, wait: bool = True) -> Path:
        """See Checkpoints."""
        target = self.folder / f"step-{step:08d}"
        with whole_folder(target) as partial:
            fill(partial)
        for old in self.newest_first()[KEPT_CHECKPOINTS:]:
            shutil.rmtree(old, ignore_errors=True)
        return target

    def clear(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)


def write_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """Note in a checkpoint how far the loop is. Raises OSError."""
    write_json(folder / PROGRESS_FILE, {**progress, CHECKSUM: _checksum(progress)})


def read_progress(folder: Path) -> dict[str, Any]:
    """What the loop noted in a checkpoint; empty if the folder is no whole checkpoint, or the note is damaged."""
    try:
        progress = json.loads((folder / PROGRESS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(progress, dict):
        return {}
    wanted = progress.pop(CHECKSUM, None)  # checkpoints of earlier versions have none
    return progress if wanted in (None, _checksum(progress)) else {}


def _checksum(progress: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(progress, sort_keys=True).encode())
