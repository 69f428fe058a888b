"""Which files the input consists of, and their captions. Reads no video.

An input is a folder, one file, a glob pattern, or a list (`listing.py`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arlon_ray.config import DataConfig
from data_pipeline import schema
from data_pipeline.listing import Video, is_list, read_list
from data_pipeline.schema import one_line

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
#: Bytes at either end of a file that go into its identity: whole small files, header and index of large ones.
IDENTITY_BYTES = 1 << 16


@dataclass(frozen=True)
class SourceFile:
    """One video file. `name` is its path within the input, `identity` a hash of its size and of both its ends.

    `caption` is empty where there is none; `caption_error` and `error` say what could not be read, `reason` what kind
    of reject the latter is.
    """

    path: str
    name: str
    size: int
    identity: str
    caption: str
    caption_error: str = ""
    error: str = ""
    reason: str = schema.UNREADABLE


def is_pattern(source: str | Path) -> bool:
    """Whether an input is a glob pattern: it has wildcards, and nothing has it as its name."""
    return glob.has_magic(str(source)) and not Path(source).exists()


def find_videos(source: str | Path, data: DataConfig | None = None) -> list[Video]:
    """The videos that an input names.

    Of a folder all (recursively, hidden ones left out), of a pattern those that match (`**` for any depth), sorted by
    name; of a list every row, in its order, with its captions (`data` names the columns); else the one file. Raises
    ArtifactError where a list cannot be read.
    """
    root, data = Path(source), data or DataConfig()
    if is_pattern(source):
        above, paths = _above(root), sorted(map(Path, glob.glob(str(source), recursive=True)))
        return [Video(path.relative_to(above).as_posix(), path) for path in paths if _is_video(path)]
    if root.is_file():
        listed = is_list(root)
        return list(read_list(root, data.path_column, data.caption_column)) if listed else [Video(root.name, root)]
    return [Video(path.relative_to(root).as_posix(), path) for path in sorted(_videos(root))]


def find_sources(source: str | Path, data: DataConfig | None = None) -> list[SourceFile]:
    """`find_videos` with identity and caption of each; a list's caption comes before one beside the file."""
    return [_source(video) for video in find_videos(source, data)]


def _above(pattern: Path) -> Path:
    """The folder above the first part of a pattern that has wildcards."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def _videos(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*files, *folders]:  # a folder with a video's name becomes a reject that says so
            if not name.startswith(".") and _is_video(Path(name)):
                yield Path(folder) / name


def _source(video: Video) -> SourceFile:
    name, path = video.name, video.path
    if path is None:
        return SourceFile("", name, 0, "", "", error=video.error, reason=video.reason)
    caption, caption_error = (" ".join(video.caption.split()), "") if video.caption else read_caption(path)
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
