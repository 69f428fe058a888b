"""Which files the input consists of, and the captions beside them. Reads no video."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.schema import one_line

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
#: Bytes at either end of a file that go into its identity: whole small files, header and index of large ones.
IDENTITY_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One video file. `name` is its path within the input, `identity` a hash of its size and of both its ends.

    `caption` is empty where there is none; `caption_error` and `error` say what could not be read.
    """

    path: str
    name: str
    size: int
    identity: str
    caption: str
    caption_error: str = ""
    error: str = ""


def find_sources(source: str | Path) -> list[SourceFile]:
    """All video files of a folder (recursively, hidden ones left out), or the one file; sorted by name."""
    root = Path(source)
    if root.is_file():
        return [_source(root, root.name)]
    return [_source(path, path.relative_to(root).as_posix()) for path in sorted(_videos(root))]


def _videos(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield Path(folder) / name


def _source(path: Path, name: str) -> SourceFile:
    caption, caption_error = read_caption(path)
    # names that are not UTF-8 reach Python with surrogates, which Parquet refuses
    printable = name.encode("utf-8", "backslashreplace").decode()
    if printable != name:
        return SourceFile("", printable, 0, "", caption, caption_error, "the name is not UTF-8: rename the file")
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            digest.update(file.read(IDENTITY_BYTES))
            if size > IDENTITY_BYTES:
                file.seek(max(size - IDENTITY_BYTES, IDENTITY_BYTES))
                digest.update(file.read(IDENTITY_BYTES))
    except OSError as error:
        return SourceFile(str(path), name, 0, "", caption, caption_error, one_line(error))
    return SourceFile(str(path), name, size, digest.hexdigest(), caption, caption_error)


def read_caption(path: Path) -> tuple[str, str]:
    """(caption, error) of a video: the text of `.txt` beside it, else "caption" of `.json`; both empty if neither."""
    text_file, json_file = path.with_suffix(".txt"), path.with_suffix(".json")
    try:
        if text_file.is_file():
            return " ".join(text_file.read_text(encoding="utf-8").split()), ""
        if json_file.is_file():
            found = json.loads(json_file.read_text(encoding="utf-8"))
            value = found.get("caption", "") if isinstance(found, dict) else ""
            if not isinstance(value, str):
                return "", f"{json_file.name}: caption is {type(value).__name__}, expected text"
            return " ".join(value.split()), ""
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        return "", one_line(error)
    return "", ""
