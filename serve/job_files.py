"""What is kept of one video while and after it is made: enough to go on behind its last finished segment.

segment-00003.safetensors   tokens, the latents handed on, the last frame, the mp4 fragment. Of a segment that is only
                            planned: tokens alone.
base.safetensors, base.mp4  what an extension goes on from: the end of the other video, and its file
given.safetensors           the picture it starts from, as latents
picture.safetensors         the same before it is encoded
video.mp4                   the finished video; from then on the segments' files give way to
end.safetensors             tokens of all segments, the latents handed on, the last frame
thumbnail.png …             pictures of it, as soon as somebody has asked for one
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from arlon_ray.generation.video import FragmentStream, GrowingVideo
from serve.blobs import Blobs, Opened
from serve.work import Frame, Latents, Tokens

FOLDER = "videos"  # of all jobs' folders
VIDEO_FILE, END, BASE, BASE_FILE = "video.mp4", "end.safetensors", "base.safetensors", "base.mp4"
GIVEN, PICTURE = "given.safetensors", "picture.safetensors"
CHECKSUM = "crc32"  # of all that a file of arrays holds
PICTURES = {"thumbnail": "thumbnail.png", "spritesheet": "spritesheet.png"}  # of the finished video


@dataclass(frozen=True)
class SegmentRecord:
    """One segment: its plan, and, once it is finished, its frames and what the next one goes on from."""

    tokens: Tokens | None = None
    overlap: Latents | None = None
    last: Frame | None = None
    fragment: bytes = b""

    @property
    def finished(self) -> bool:
        """Whether its frames are there."""
        return bool(self.fragment)


@dataclass
class Restored:
    """Where a job stands: `done` segments are in its file; tokens of these, and of later ones that are planned."""

    done: int = 0
    tokens: dict[int, Tokens] = field(default_factory=dict)
    overlap: Latents | None = None
    last: Frame | None = None


class JobFiles:
    """The files of one job, in a folder of their own. Methods block."""

    def __init__(self, blobs: Blobs, job_id: str) -> None:
        self._blobs, self._folder = blobs, f"{FOLDER}/{job_id}"
        # the file that grows must be one of this machine
        self._scratch = None if blobs.folder else Path(tempfile.gettempdir()) / "arlon-ray" / job_id
        self.growing = GrowingVideo((self._scratch or blobs.folder / self._folder) / VIDEO_FILE)  # type: ignore[operator]

    @property
    def finished(self) -> bool:
        """Whether the video and all that belongs to it are there."""
        return self.exists(END) and self.exists(VIDEO_FILE)

    def exists(self, name: str) -> bool:
        """Whether there is one of the files."""
        return self._blobs.exists(self._name(name))

    def restore(self) -> Restored:
        """Write the file of the finished segments anew, and say where it stands."""
        self.growing = GrowingVideo(self.growing.path)
        found, unbroken = self._base(), True
        for index, record in self.segments(found.done):
            if record.tokens is not None:
                found.tokens[index] = record.tokens
            unbroken = unbroken and record.finished and index == found.done
            if unbroken:
                self.growing.add(record.fragment)
                found.done, found.overlap, found.last = index + 1, record.overlap, record.last
        return found

    def _base(self) -> Restored:
        if not self.exists(BASE):
            return Restored()
        self.growing.add(self.read(BASE_FILE))
        return _end(self.read(BASE))

    def segments(self, first: int = 0) -> Iterator[tuple[int, SegmentRecord]]:
        """The records from segment `first` on, in order; one that is damaged counts as missing."""
        for name in self._segment_names():
            index = int(name.rsplit("-", 1)[1].split(".")[0])
            if index >= first and (record := self._read(name)) is not None:
                yield index, record

    def write_segment(self, index: int, record: SegmentRecord) -> None:
        """Keep it, in place of what was there. Raises OSError."""
        arrays = {"tokens": record.tokens, "overlap": record.overlap, "last": record.last}
        if record.fragment:
            arrays["fragment"] = np.frombuffer(record.fragment, np.uint8)
        self._blobs.write(self._name(f"segment-{index:05d}.safetensors"), _packed(arrays))

    def forget(self, anew: Sequence[int]) -> None:
        """The plan of these segments, and all that is to be seen from the first of them on."""
        for name in (VIDEO_FILE, *PICTURES.values()):
            self._blobs.delete(self._name(name))
        for index, record in list(self.segments(anew[0])):
            if index in anew:
                self._blobs.delete(self._name(f"segment-{index:05d}.safetensors"))
            else:
                self.write_segment(index, SegmentRecord(record.tokens))

    def finish(self, restored: Restored, keep_segments: bool = False) -> None:
        """The video as one file, and its end in place of the segments (or beside them). Raises OSError."""
        path = self.growing.path
        if self.growing.partial.exists() or not path.exists():  # else this was done, and what follows was not
            self.growing.finish()
        if self._scratch:
            self._blobs.write(self._name(VIDEO_FILE), path.read_bytes())
        tokens = np.stack([restored.tokens[i] for i in range(restored.done)]) if restored.tokens else None
        arrays = {"tokens": tokens, "overlap": restored.overlap, "last": restored.last}
        self._blobs.write(self._name(END), _packed({**arrays, "done": np.array([restored.done])}))
        for name in [] if keep_segments else [*self._segment_names(), self._name(BASE), self._name(BASE_FILE)]:
            self._blobs.delete(name)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def kept(self, count: int) -> Iterator[bytes]:
        """The first `count` segments, as far as they are there: parts of one fragmented mp4.

        Raises FileNotFoundError before the first if all is removed meanwhile.
        """
        stream, done = FragmentStream(), 0
        if self.exists(BASE):
            done = _end(self.read(BASE)).done
            yield stream.part(self.read(BASE_FILE)).data
        for index, record in self.segments(done):
            if index != done or index >= count or not record.finished:
                return
            yield stream.part(record.fragment).data
            done += 1

    def forget_all(self, keep_segments: bool = False) -> None:
        """Everything but the picture that the video starts from, or but that and what `kept` reads."""
        stay = {self._name(PICTURE)}
        if keep_segments:
            stay |= {*self._segment_names(), self._name(BASE), self._name(BASE_FILE)}
        for name in self._blobs.names(self._folder):
            if name not in stay:
                self._blobs.delete(name)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def go_on_from(self, other: JobFiles) -> None:
        """Start from the end of a finished video."""
        self._blobs.write(self._name(BASE_FILE), other.read(VIDEO_FILE))
        self._blobs.write(self._name(BASE), other.read(END))
        self.write_picture(other.picture())

    def write_picture(self, picture: Frame | None) -> None:
        """The picture that the video starts from, if there is one: uint8 [H, W, 3]."""
        if picture is not None:
            self._blobs.write(self._name(PICTURE), _packed({"picture": picture}))

    def picture(self) -> Frame | None:
        """The picture that the video starts from, if there is one."""
        return self._array(PICTURE, "picture")

    def write_given(self, latents: Latents) -> None:
        """The same as latents."""
        self._blobs.write(self._name(GIVEN), _packed({"latents": latents}))

    def given(self) -> Latents | None:
        """The same as latents, if it has been encoded."""
        return self._array(GIVEN, "latents")

    def size(self) -> int:
        """Bytes of all of them."""
        return self._blobs.size(self._folder)

    def read(self, name: str) -> bytes:
        """One of the files. Raises FileNotFoundError."""
        return self._blobs.read(self._name(name))

    def open(self, name: str) -> Opened:
        """One of the files, to be read in parts. Raises FileNotFoundError."""
        return self._blobs.open(self._name(name))

    def write(self, name: str, data: bytes) -> None:
        """One of the files."""
        self._blobs.write(self._name(name), data)

    def remove(self, name: str) -> None:
        """One of the files, if it is there."""
        self._blobs.delete(self._name(name))

    def delete(self) -> None:
        """Remove everything."""
        self._blobs.delete_folder(self._folder)
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _segment_names(self) -> list[str]:
        return [name for name in self._blobs.names(self._folder) if name.rsplit("/", 1)[1].startswith("segment-")]

    def _array(self, name: str, key: str) -> np.ndarray | None:
        return _unpacked(self.read(name))[key] if self.exists(name) else None

    def _read(self, name: str) -> SegmentRecord | None:
        try:
            found = _unpacked(self._blobs.read(name))
        except (FileNotFoundError, SafetensorError):
            return None
        fragment = found.pop("fragment", np.zeros(0, np.uint8)).tobytes()
        return SegmentRecord(**found, fragment=fragment)

    def _name(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _packed(arrays: dict[str, np.ndarray | None]) -> bytes:
    there = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    return save({**there, CHECKSUM: np.array([_checksum(there)], np.uint32)})


def _unpacked(data: bytes) -> dict[str, np.ndarray]:
    """What was packed. Raises SafetensorError where it is cut, or not what was written."""
    found = load(data)
    wanted = found.pop(CHECKSUM, None)  # files of earlier versions have none
    if wanted is not None and int(wanted[0]) != _checksum(found):
        raise SafetensorError("not what was written: its checksum is another one")
    return found


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of names and values, in the order of names."""
    checksum = 0
    for name, array in sorted(arrays.items()):
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), checksum))
    return checksum


def _end(data: bytes) -> Restored:
    found = _unpacked(data)
    tokens = dict(enumerate(found["tokens"])) if "tokens" in found else {}
    return Restored(int(found["done"][0]), tokens, found.get("overlap"), found.get("last"))
