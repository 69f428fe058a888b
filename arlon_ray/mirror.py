"""Folders of a bucket as folders of this machine, where nodes share no folder.

`local("s3://bucket/run/dataset")` is a path that says by its name which folder of which bucket it stands for, and so
means the same on every node. The bucket is the truth: `pull` makes the files here what they are there, `push` the other
way round, and what is written whole (`artifact.whole_folder`, `artifact.write_json`) is there when the call returns.

For every other path these functions do what pathlib does, or nothing. They raise OSError where a bucket cannot be used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

#: Where mirrors lie, unless ARLON_MIRROR says otherwise. They are copies: delete them at will.
DEFAULT_ROOT = "~/.cache/arlon/mirror"
#: The files that say that the folder around them is whole: they go last, and first when it is replaced.
SEALS = frozenset({"lineage.json", "manifest.json", "bundle.json", "progress.json"})
#: Files that are fetched at the same time.
THREADS = 8
_BLOCK_BYTES = 4 << 20
#: How "://" looks in the name of the folder that stands for a bucket.
_MARK = quote("://", safe="")


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URI; `file://` and Windows drives are not asked for."""
    return re.match(r"[a-z][a-z0-9+.-]+://", str(location)) is not None


@cache
def _filesystem(scheme: str, netloc: str, query: str) -> tuple[Any, str]:
    from pyarrow import fs

    return fs.FileSystem.from_uri(urlunsplit((scheme, netloc, "/", query, "")))


def opened(location: str) -> tuple[Any, str]:
    """(pyarrow file system, path on it) of a URI. Raises OSError or ValueError for one that pyarrow cannot use."""
    parts = urlsplit(location)
    files, root = _filesystem(parts.scheme, parts.netloc, parts.query)
    return files, (root.rstrip("/") + unquote(parts.path)).rstrip("/")


def local(location: str | Path) -> Path:
    """The folder or file of this machine that stands for a URI; of a path the path itself."""
    if not is_remote(location):
        return Path(location)
    parts = urlsplit(str(location))
    bucket = quote(urlunsplit((parts.scheme, parts.netloc, "", parts.query, "")), safe="")
    return _root() / bucket / unquote(parts.path).strip("/")


def _root() -> Path:
    return Path(os.environ.get("ARLON_MIRROR") or DEFAULT_ROOT).expanduser().absolute()


def aside(path: Path) -> Path:
    """The path; of one in a bucket, where no database can lie, a folder beside its mirror that is never mirrored."""
    location = origin(path)
    return path if location is None else _root() / "aside" / hashlib.sha256(location.encode()).hexdigest()[:16]


def origin(path: Path) -> str | None:
    """The URI that a path stands for; None for one that lies on this machine alone, as what is half written does."""
    for position, part in enumerate(path.parts):
        if _MARK in part:
            below = path.parts[position + 1 :]
            if any(name.endswith(".partial") for name in below):
                return None
            bucket = urlsplit(unquote(part))
            return urlunsplit(bucket._replace(path=quote("/".join(["", *below]))))
    return None


def named(text: str) -> str:
    """A message with the URIs in place of the paths that stand for them."""
    pattern = rf"/[^\s,;:'\"]*?{_MARK}[^\s,;:'\"()]*"
    return re.sub(pattern, lambda found: origin(Path(found[0])) or found[0], text)


def filesystem(path: Path) -> tuple[Any, str]:
    """(pyarrow file system, path on it), for Ray; (None, the path) for a folder of this machine."""
    location = origin(path)
    return (None, str(path)) if location is None else opened(location)


def exists(path: Path) -> bool:
    """Whether there is a file or folder."""
    files, root = filesystem(path)
    return path.exists() if files is None else files.get_file_info(root).type.name != "NotFound"


def glob(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder and matches a pattern of names (no `**`), sorted; nothing is fetched."""
    files, root = filesystem(folder)
    if files is None:
        return sorted(folder.glob(pattern))
    depth = len(PurePosixPath(pattern).parts)
    names = [PurePosixPath(name) for name in _listed(files, root, recursive=depth > 1, folders=True)]
    return sorted(folder / name for name in names if len(name.parts) == depth and name.match(pattern))


def readable(path: Path) -> Any:
    """What pyarrow reads a file from: the path, or the file in the bucket, of which only what is asked for is read."""
    files, root = filesystem(path)
    return path if files is None else files.open_input_file(root)


def read(path: Path) -> bytes:
    """All of a small file."""
    files, root = filesystem(path)
    if files is None:
        return path.read_bytes()
    with files.open_input_stream(root) as file:
        return bytes(file.read())


def pull(path: Path) -> Path:
    """Make a file or folder here what it is in the bucket: fetch what is new, remove what is not there. The path."""
    files, root = filesystem(path)
    if files is None:
        return path
    info = files.get_file_info(root)
    if info.type.name == "File":
        _fetch(files, info, path, anew=path.suffix == ".json")
        return path
    there = _listed(files, root) if info.type.name == "Directory" else {}
    for file in list(_files(path)):
        if file.relative_to(path).as_posix() not in there:
            file.unlink(missing_ok=True)
    # a bucket's times are whole seconds: two versions of one size may look the same, but their seals are not
    seals = [name for name in there if PurePosixPath(name).name in SEALS]
    stale = [PurePosixPath(name).parent for name in seals if _differs(files, there[name], path / name)]

    def fetch(name: str) -> None:
        below = any(PurePosixPath(name).is_relative_to(folder) for folder in stale)
        _fetch(files, there[name], path / name, anew=below or name.endswith(".json"))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, there.keys() - seals))
        list(pool.map(fetch, seals))
    return path


def push(path: Path) -> None:
    """Make a file or folder in the bucket what it is here; the file that says that all is there comes last."""
    files, root = filesystem(path)
    if files is None:
        return
    if path.is_file():
        upload(path, path)
        return
    there, here = _listed(files, root), {file.relative_to(path).as_posix(): file for file in _files(path)}
    changed = [name for name, file in here.items() if name not in there or not _same(there[name], file)]
    gone = there.keys() - here.keys()
    if changed or gone:
        seals = {name for name in there if PurePosixPath(name).name in SEALS}
        for name in sorted(gone | seals, key=_seals_first):
            files.delete_file(f"{root}/{name}")
        for name in sorted({*changed, *(seals & here.keys())}, key=_seals_first, reverse=True):
            upload(here[name], path / name)


def upload(source: Path, target: Path) -> None:
    """Write a file of this machine to where `target` stands for; it appears whole or not at all.

    In one call of pyarrow, which no exception leaves half way: a stream that Python closes then is a shorter file.
    """
    from pyarrow import fs

    files, root = filesystem(target)
    fs.copy_files(str(source), root, fs.LocalFileSystem(), files, chunk_size=_BLOCK_BYTES)
    if source == target:
        _settle(files, root, target)


def move(source: Path, target: Path) -> None:
    """Move a file within one mirror; within the bucket, where it lies in one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    (files, root), (_, place) = filesystem(source), filesystem(target)
    if files is not None:
        files.move(root, place)
        _settle(files, place, target)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    files, root = filesystem(path)
    if files is not None:
        kind = files.get_file_info(root).type.name
        if kind == "Directory":
            files.delete_dir(root)
        elif kind == "File":
            files.delete_file(root)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def forget(path: Path) -> None:
    """Drop the copy here of what lies in a bucket."""
    if origin(path) is not None:
        shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be made in a folder."""
    files, root = filesystem(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f".probe-{uuid.uuid4().hex[:8]}"
    (folder / name).touch()
    (folder / name).unlink()
    if files is not None:
        with files.open_output_stream(f"{root}/{name}") as stream:
            stream.write(b"x")
        files.delete_file(f"{root}/{name}")


def _listed(files: Any, root: str, *, recursive: bool = True, folders: bool = False) -> dict[str, Any]:
    """What lies below a folder of a bucket, by its name relative to it."""
    from pyarrow import fs

    found = files.get_file_info(fs.FileSelector(root, recursive=recursive, allow_not_found=True))
    wanted = [info for info in found if folders or info.type == fs.FileType.File]
    return {info.path[len(root) :].strip("/"): info for info in wanted}


def _files(folder: Path) -> Iterator[Path]:
    """The files below a folder, but for those that are half written."""
    for above, _, names in os.walk(folder):
        yield from (Path(above) / name for name in names if not name.endswith(".partial"))


def _seals_first(name: str) -> tuple[bool, int]:
    path = PurePosixPath(name)
    return path.name not in SEALS, len(path.parts)


def _same(info: Any, file: Path) -> bool:
    """Whether a file here is the one in the bucket: by its size and the time at which that was written."""
    try:
        here = file.stat()
    except OSError:
        return False
    return bool(here.st_size == info.size and here.st_mtime_ns == info.mtime_ns)


def _differs(files: Any, info: Any, file: Path) -> bool:
    """Whether a small file is here, but as another than the one in the bucket."""
    with suppress(FileNotFoundError), files.open_input_stream(info.path) as stream:
        return file.read_bytes() != stream.read()
    return False


def _fetch(files: Any, info: Any, target: Path, *, anew: bool = False) -> None:
    if not anew and _same(info, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with files.open_input_stream(info.path) as stream, partial.open("wb") as file:
            shutil.copyfileobj(stream, file, _BLOCK_BYTES)
        os.utime(partial, ns=(info.mtime_ns, info.mtime_ns))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _settle(files: Any, place: str, target: Path) -> None:
    """Note that the file here is the one in the bucket."""
    written = files.get_file_info(place).mtime_ns
    if written is not None and target.exists():
        os.utime(target, ns=(written, written))
