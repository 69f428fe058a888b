"""Where input files lie: on this machine, or in a bucket or on HDFS (`s3://`, `gs://`, `hdfs://`) through pyarrow.

A location is a path, or a URI as pyarrow takes it: `s3://bucket/videos?endpoint_override=host:9000&scheme=http`. Local
paths stay with the operating system, which also knows names that are not UTF-8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from arlon_ray.artifact import ArtifactError
from arlon_ray.mirror import is_remote, opened

#: Bytes that one request to a remote file fetches at least.
REQUEST_BYTES = 1 << 20


def _remote(location: str) -> tuple[fs.FileSystem, str]:
    """(file system, path on it) of a URI. Raises ArtifactError for one that pyarrow cannot use."""
    try:
        return opened(location)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ArtifactError(f"{location}: not a location that can be opened: {error}") from None


def child(location: str, name: str) -> str:
    """The location `name` below `location`; an absolute path or URI stays what it is."""
    if is_remote(name):
        return name
    if not is_remote(location):
        return str(Path(location) / Path(name).expanduser())
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def parent(location: str) -> str:
    """The folder of a location."""
    if not is_remote(location):
        return str(Path(location).parent)
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=str(PurePosixPath(parts.path).parent)))


def beside(location: str, suffix: str) -> str:
    """The location with another suffix: `a/b.mp4` → `a/b.txt`."""
    if not is_remote(location):
        return str(Path(location).with_suffix(suffix))
    parts = urlsplit(location)
    return urlunsplit(parts._replace(path=str(PurePosixPath(parts.path).with_suffix(suffix))))


def base_name(location: str) -> str:
    """The last part of a location."""
    return unquote(PurePosixPath(urlsplit(location).path).name) if is_remote(location) else Path(location).name


def open_input(location: str) -> BinaryIO:
    """A file for reading at any place of it. Raises OSError."""
    if not is_remote(location):
        return Path(location).open("rb")
    system, path = _remote(location)
    return cast(BinaryIO, system.open_input_file(path))


def is_file(location: str) -> bool:
    """Whether there is a file. Raises OSError where its storage cannot be reached."""
    if not is_remote(location):
        return Path(location).is_file()
    system, path = _remote(location)
    return system.get_file_info(path).type == fs.FileType.File


def exists(location: str) -> bool:
    """Whether there is a file or folder. Raises OSError where its storage cannot be reached."""
    if not is_remote(location):
        return Path(location).exists()
    system, path = _remote(location)
    return system.get_file_info(path).type != fs.FileType.NotFound


def walk(location: str) -> Iterator[str]:
    """Names, relative to a folder, of all that lies below it, hidden things left out; folders too. Sorted."""
    if is_remote(location):
        system, path = _remote(location)
        found = system.get_file_info(fs.FileSelector(path, recursive=True))
        names = sorted(info.path[len(path) :].lstrip("/") for info in found)
        yield from (name for name in names if not any(part.startswith(".") for part in name.split("/")))
        return
    names = []
    for folder, folders, files in os.walk(location):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(location)
        names += [(below / name).as_posix() for name in [*files, *folders] if not name.startswith(".")]
    yield from sorted(names)


def matches(location: str, pattern: str) -> list[str]:
    """Names below a remote `location` that match a glob pattern; `**` stands for any depth, as in `glob.glob`."""
    expression = re.compile(re.sub(r"\*\*/?|\*|\?|\[!?[^]]*\]|[^*?[]+", _as_regex, pattern))
    return [name for name in walk(location) if expression.fullmatch(name)]


def _as_regex(token: re.Match[str]) -> str:
    text = token[0]
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    if text.startswith("["):
        return text.replace("[!", "[^", 1)
    return wildcards.get(text, re.escape(text))
