"""Which files the input consists of, and their captions. Reads no video.

An input is a folder, one file, a glob pattern, or a list (`listing.py`); any of them local or remote (`storage.py`).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import DataConfig
from data_pipeline import schema, storage
from data_pipeline.listing import Video, is_list, read_list
from data_pipeline.schema import one_line

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"})
#: Bytes at either end of a file that go into its identity: whole small files, header and index of large ones.
IDENTITY_BYTES = 1 << 16
#: Remote files that are looked at at the same time.
REMOTE_THREADS = 16


@dataclass(frozen=True)
class TimedCaption:
    """What is to be seen from second `start_s` on, until the next one begins."""

    start_s: float
    text: str


@dataclass(frozen=True)
class Caption:
    """What came with a video: one text for all of it, or `parts` that follow each other, the first from second 0 on.

    Nothing, or `error`, where there is none or it cannot be read.
    """

    text: str = ""
    parts: tuple[TimedCaption, ...] = ()
    error: str = ""

    @property
    def said(self) -> str:
        """All of it in one line: "0s: A circle moves to the left. 2.5s: It moves to the right."; empty if nothing."""
        return " ".join(f"{part.start_s:g}s: {part.text}" for part in self.parts) or self.text


@dataclass(frozen=True)
class SourceFile:
    """One video file at the location `path`. `name` is its path within the input, `identity` hashes size and both ends.

    `error` says what of the file could not be read, `reason` what kind of reject that is.
    """

    path: str
    name: str
    size: int
    identity: str
    caption: Caption = Caption()
    error: str = ""
    reason: str = schema.UNREADABLE


def is_pattern(source: str | Path) -> bool:
    """Whether an input is a glob pattern: it has wildcards, and nothing has it as its name."""
    if storage.is_remote(source):
        # a URI's options come after a question mark, which is no wildcard there
        return glob.has_magic(str(source).partition("?")[0])
    return glob.has_magic(str(source)) and not Path(source).exists()


def find_videos(source: str | Path, data: DataConfig | None = None) -> list[Video]:
    """The videos that an input names.

    Of a folder all (recursively, hidden ones left out), of a pattern those that match (`**` for any depth), sorted by
    name; of a list every row, in its order, with its captions (`data` names the columns); else the one file. Raises
    ArtifactError where a list cannot be read or a remote input cannot be reached.
    """
    location, data = str(source), data or DataConfig()
    if not storage.is_remote(location):
        return _find(location, data)
    try:
        return _find(location, data)
    except OSError as error:
        raise ArtifactError(f"{location}: cannot be read: {one_line(error)}") from None


def _find(location: str, data: DataConfig) -> list[Video]:
    if is_pattern(location):
        above, pattern = _split(location)
        if storage.is_remote(location):
            names = storage.matches(above, pattern)
        else:
            names = sorted(glob.glob(pattern, root_dir=above, recursive=True))
        return [Video(Path(name).as_posix(), storage.child(above, name)) for name in names if _is_video(name)]
    if storage.is_file(location):
        if is_list(location):
            return list(read_list(location, data.path_column, data.caption_column))
        return [Video(storage.base_name(location), location)]
    # a folder with a video's name becomes a reject that says so
    return [Video(name, storage.child(location, name)) for name in storage.walk(location) if _is_video(name)]


def find_sources(source: str | Path, data: DataConfig | None = None) -> list[SourceFile]:
    """`find_videos` with identity and caption of each; a list's caption comes before one beside the file."""
    videos = find_videos(source, data)
    if not any(video.path is not None and storage.is_remote(video.path) for video in videos):
        return [_source(video) for video in videos]
    with ThreadPoolExecutor(REMOTE_THREADS) as pool:
        return list(pool.map(_source, videos))


def _split(pattern: str) -> tuple[str, str]:
    """(the folder above the first part of a pattern that has wildcards, the rest of the pattern)."""
    path, mark, options = pattern.partition("?") if storage.is_remote(pattern) else (pattern, "", "")
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return "/".join(parts[:first]) + mark + options or ".", "/".join(parts[first:])


def _is_video(name: str) -> bool:
    return Path(name).suffix.lower() in VIDEO_SUFFIXES


def _source(video: Video) -> SourceFile:
    name, path = video.name, video.path
    if path is None:
        return SourceFile("", name, 0, "", error=video.error, reason=video.reason)
    caption = Caption(" ".join(video.caption.split())) if video.caption else read_caption(path)
    # names that are not UTF-8 reach Python with surrogates, which Parquet refuses
    printable = name.encode("utf-8", "backslashreplace").decode()
    if printable != name:
        return SourceFile("", printable, 0, "", caption, "the name is not UTF-8: rename the file")
    try:
        size, digest = 0, hashlib.sha256()
        with storage.open_input(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            digest.update(str(size).encode())
            digest.update(file.read(IDENTITY_BYTES))
            if size > IDENTITY_BYTES:
                file.seek(max(size - IDENTITY_BYTES, IDENTITY_BYTES))
                digest.update(file.read(IDENTITY_BYTES))
    except OSError as error:
        return SourceFile(path, name, 0, "", caption, one_line(error))
    return SourceFile(path, name, size, digest.hexdigest(), caption)


def read_caption(path: str) -> Caption:
    """The caption of a video: the text of `.txt` beside it, else "captions" or "caption" of `.json`.

    `captions` is a list of {"start_s": seconds, "caption": text}, for a video whose caption changes: the first from
    second 0 on, each later than the one before it.
    """
    readers: tuple[tuple[str, Callable[[bytes], Caption]], ...] = ((".txt", _from_text), (".json", _from_json))
    for suffix, read in readers:
        location = storage.beside(path, suffix)
        try:
            with storage.open_input(location) as file:
                return read(file.read())
        except (FileNotFoundError, IsADirectoryError):
            continue
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, or not what it should hold
            return Caption(error=f"{storage.base_name(location)}: {one_line(error)}")
    return Caption()


def _from_text(raw: bytes) -> Caption:
    return Caption(" ".join(raw.decode("utf-8").split()))


def _from_json(raw: bytes) -> Caption:
    found = json.loads(raw.decode("utf-8"))
    if not isinstance(found, dict):
        return Caption()
    text, timed = found.get("caption", ""), found.get("captions")
    # other datasets have lists of plain texts under this name, each a caption of the whole
    if timed is not None and not (
        "caption" in found and isinstance(timed, list) and all(isinstance(t, str) for t in timed)
    ):
        return Caption(parts=_parts(timed))
    if not isinstance(text, str):
        raise ValueError(f"caption is {type(text).__name__}, expected text")
    return Caption(" ".join(text.split()))


def _parts(found: object) -> tuple[TimedCaption, ...]:
    """Timed captions from JSON. Raises ValueError."""
    if not isinstance(found, list) or not found:
        raise ValueError('captions: expected a list of {"start_s": seconds, "caption": text}')
    parts: list[TimedCaption] = []
    for number, part in enumerate(found, 1):
        start, text = (part.get("start_s"), part.get("caption")) if isinstance(part, dict) else (None, None)
        if not isinstance(start, (int, float)) or not isinstance(text, str) or not text.strip():
            raise ValueError(f'captions, number {number}: expected {{"start_s": seconds, "caption": text}}')
        after = parts[-1].start_s if parts else None
        if not (start == 0 if after is None else after < start < float("inf")):
            expected = "0, where the video begins" if after is None else f"more than {after:g}, where the last begins"
            raise ValueError(f"captions, number {number}: start_s {start:g}, expected {expected}")
        parts.append(TimedCaption(float(start), " ".join(text.split())))
    return tuple(parts)
