"""Files by name, in a folder or in a bucket."""

from __future__ import annotations

import copy
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs

from arlon_ray.generation.video import whole_file

_AHEAD = 2**20  # bytes that are asked of a bucket at once


@dataclass(frozen=True)
class Opened:
    """A file that is open for reading, its length in bytes, and when it was written (Unix seconds)."""

    file: BinaryIO
    size: int
    modified: float


class Blobs:
    """Whole files under one place. Each appears whole or not at all. Methods block."""

    def __init__(self, place: str | Path) -> None:
        """`place`: a folder, or an address that pyarrow opens (s3://, gs://, …). Raises ValueError for others."""
        if "://" in str(place):
            self._files, self._root = fs.FileSystem.from_uri(str(place))
        else:
            self._files, self._root = fs.LocalFileSystem(), str(Path(place).expanduser().absolute())
        self.folder = Path(self._root) if isinstance(self._files, fs.LocalFileSystem) else None

    def below(self, folder: str) -> Blobs:
        """The files in a folder of this place, as a place of its own."""
        inner = copy.copy(self)
        inner._root = f"{self._root}/{folder}"
        inner.folder = self.folder / folder if self.folder else None
        return inner

    def path(self, name: str) -> Path | None:
        """Where the file lies, if that is in a folder of this machine."""
        return self.folder / name if self.folder else None

    def write(self, name: str, data: bytes) -> None:
        """Raises OSError."""
        if (path := self.path(name)) is None:
            with self._files.open_output_stream(f"{self._root}/{name}") as file:
                file.write(data)
            return
        with whole_file(path) as partial:
            partial.write_bytes(data)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        with self._files.open_input_stream(f"{self._root}/{name}") as file:
            return file.read()

    def open(self, name: str) -> Opened:
        """Read it in parts. In a folder it can be read to its end even if it is removed. Raises FileNotFoundError."""
        if path := self.path(name):
            file = path.open("rb")
            status = os.fstat(file.fileno())
            return Opened(file, status.st_size, status.st_mtime)
        address = f"{self._root}/{name}"
        raw = self._files.open_input_file(address)
        written = self._files.get_file_info(address).mtime_ns or 0
        return Opened(io.BufferedReader(raw, _AHEAD), raw.size(), written / 1e9)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self._files.get_file_info(f"{self._root}/{name}").type == fs.FileType.File

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none if it is not there."""
        selector = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        found = self._files.get_file_info(selector)
        return sorted(f"{folder}/{each.base_name}" for each in found if each.type == fs.FileType.File)

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in a folder, sorted; none if it is not there."""
        selector = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        found = self._files.get_file_info(selector)
        return sorted(each.base_name for each in found if each.type == fs.FileType.Directory)

    def size(self, folder: str) -> int:
        """Bytes of the files in a folder."""
        selector = fs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        return sum(each.size or 0 for each in self._files.get_file_info(selector))

    def changed(self, folder: str) -> float:
        """When something in a folder was written last, in Unix seconds; 0 where nobody knows."""
        path = f"{self._root}/{folder}"
        inside = self._files.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        times = [each.mtime_ns for each in (self._files.get_file_info(path), *inside)]
        return max((time for time in times if time is not None), default=0) / 1e9

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._files.delete_file(f"{self._root}/{name}")

    def delete_folder(self, folder: str) -> None:
        """Remove all that is in a folder, and the folder."""
        if self._files.get_file_info(f"{self._root}/{folder}").type != fs.FileType.NotFound:
            self._files.delete_dir(f"{self._root}/{folder}")
