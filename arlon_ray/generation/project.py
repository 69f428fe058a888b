"""A video as what it was made of: the text, seed, tokens and latents of every segment, in a folder.

project.json                   bundle, options, the start (whether its latents are part of the video)
start.safetensors              latents that the first segment goes on from, where there are any
until.safetensors              latents that the last segment leads up to, where there are any
segment-00003.safetensors      `tokens` [t', h', w'] (not of a baseline), `latents` [C, n, h, w]; text and seed beside
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from arlon_ray.artifact import let_others_read, one_line, write_json
from arlon_ray.generation.given import Given
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.storyboard import SegmentText
from arlon_ray.generation.video import whole_file

PROJECT_FILE, START_FILE, UNTIL_FILE = "project.json", "start.safetensors", "until.safetensors"
#: Of a segment that leads up to what the project ends with, and of one that was made again.
UNTIL, EDITED = "until", "edited"
_TEXT: TypeAdapter[SegmentText] = TypeAdapter(SegmentText)


class ProjectError(ValueError):
    """A project that cannot be read, or was made with another bundle. One line."""


@dataclass(frozen=True)
class ProjectSegment:
    """One segment; its latents are the new ones, without what it took over."""

    text: SegmentText
    seed: int
    latents: np.ndarray
    tokens: np.ndarray | None = None
    mark: str = ""  # what else it was made of: UNTIL, or EDITED


@dataclass(frozen=True, eq=False)
class Project:
    """Segments in `folder`, each of which appears whole or not at all."""

    folder: Path
    bundle: str
    options: GenerationOptions
    start: Given | None = None
    until: Given | None = None

    @classmethod
    def create(
        cls,
        folder: Path,
        bundle: str,
        options: GenerationOptions,
        start: Given | None = None,
        until: Given | None = None,
    ) -> Project:
        """A new one without segments. `bundle` is the bundle's fingerprint. Raises ProjectError if one is there."""
        if cls.is_in(folder):
            raise ProjectError(f"{folder}: there is a project already; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, given in ((START_FILE, start), (UNTIL_FILE, until)):
            if given is not None:
                _save(folder / name, {"latents": given.latents}, {})
            else:
                (folder / name).unlink(missing_ok=True)  # of one that was given up before it was there
        shown = start is not None and start.shown
        write_json(
            folder / PROJECT_FILE, {"bundle": bundle, "options": options.model_dump(mode="json"), "shown": shown}
        )
        return cls(folder, bundle, options, start, until)

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether there is one."""
        return (folder / PROJECT_FILE).exists()

    @classmethod
    def open(cls, folder: Path, bundle: str) -> Project:
        """Raises ProjectError if there is none, or one of another bundle."""
        try:
            noted = json.loads((folder / PROJECT_FILE).read_text())
            options = GenerationOptions.model_validate(noted["options"])
            made_with, shown = str(noted["bundle"]), bool(noted["shown"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ProjectError(f"{folder}: no project that can be read: {one_line(error)}") from None
        if made_with != bundle:
            raise ProjectError(f"{folder}: made with the bundle {made_with[:12]}…, but this one is {bundle[:12]}…")
        start, until = (
            Given(_load(folder / name)[0]["latents"], shown=its) if (folder / name).exists() else None
            for name, its in ((START_FILE, shown), (UNTIL_FILE, False))
        )
        return cls(folder, bundle, options, start, until)

    def __len__(self) -> int:
        return len(list(self.folder.glob("segment-*.safetensors")))

    def __iter__(self) -> Iterator[ProjectSegment]:
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int) -> ProjectSegment:
        """Raises ProjectError if the segment is missing or damaged."""
        arrays, noted = _load(self._path(index))
        try:
            text = _TEXT.validate_json(noted["text"])
            return ProjectSegment(
                text, int(noted["seed"]), arrays["latents"], arrays.get("tokens"), noted.get("mark", "")
            )
        except (KeyError, ValueError) as error:
            raise ProjectError(f"{self._path(index)}: damaged: {one_line(error)}") from None

    def texts(self) -> list[SegmentText]:
        """Of all segments. Raises ProjectError if one is missing or damaged."""
        try:
            return [_TEXT.validate_json(_noted(self._path(index))["text"]) for index in range(len(self))]
        except ProjectError:
            raise
        except (KeyError, ValueError) as error:
            raise ProjectError(f"{self.folder}: damaged: {one_line(error)}") from None

    def tokens(self, count: int) -> list[np.ndarray]:
        """Of the first so many segments. Raises ProjectError if one is missing or damaged, or has none."""
        found = []
        for index in range(count):
            with _opened(self._path(index)) as file:
                if "tokens" not in file.keys():  # noqa: SIM118
                    raise ProjectError(f"{self._path(index)}: no tokens in it: made by a baseline")
                found.append(file.get_tensor("tokens"))
        return found

    def begins(self, texts: Sequence[SegmentText], seed: int) -> bool:
        """Whether its segments are the first ones of a video of these texts and this seed, as they were first made.

        Those from the first one on that cannot be read do not count.
        """
        noted = self._readable()
        marks = [UNTIL if self.until and index == len(texts) - 1 else "" for index in range(len(texts))]
        asked = [(_TEXT.dump_json(text).decode(), str(seed), mark) for text, mark in zip(texts, marks, strict=True)]
        found = [(its.get("text"), its.get("seed"), its.get("mark", "")) for its in noted]
        return found == asked[: len(found)]

    def drop_damaged(self) -> int:
        """Forget the first segment that cannot be read, and all behind it; returns how many were forgotten."""
        kept = {self._path(index) for index in range(len(self._readable()))}
        damaged = [path for path in self.folder.glob("segment-*.safetensors") if path not in kept]
        for path in damaged:
            path.unlink()
        return len(damaged)

    def _readable(self) -> list[dict[str, str]]:
        """What is noted beside the segments before the first that cannot be read: a file that is cut off cannot."""
        noted = []
        with suppress(ProjectError):
            for index in range(len(self)):
                noted.append(_noted(self._path(index)))
        return noted

    def write(self, index: int, segment: ProjectSegment) -> None:
        """In place of what segment `index` was."""
        arrays = {"latents": segment.latents}
        if segment.tokens is not None:
            arrays["tokens"] = segment.tokens
        text = _TEXT.dump_json(segment.text).decode()
        _save(self._path(index), arrays, {"text": text, "seed": str(segment.seed), "mark": segment.mark})

    def _path(self, index: int) -> Path:
        return self.folder / f"segment-{index:05d}.safetensors"


def _save(path: Path, arrays: Mapping[str, np.ndarray], noted: Mapping[str, str]) -> None:
    with whole_file(path) as partial:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, dict(noted))
        let_others_read(partial)
        with partial.open("rb") as file:  # or a machine that loses its power may keep the name alone
            os.fsync(file.fileno())


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _noted(path: Path) -> dict[str, str]:
    """What is noted beside the arrays of a file, without them."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ProjectError(f"{path}: cannot be read: {one_line(error)}") from None
