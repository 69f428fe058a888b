"""The state of a training on disk, by the names of parameters, whatever engine and however many workers wrote it.

A worker writes the pieces that it holds: a run of elements of a flattened parameter ("parameter"), of its moving
average ("average"), of what the optimizer keeps for it ("exp_avg", …), or a buffer ("buffer"). Whoever goes on puts
together what it needs of all workers' files: one process or many, with any stage of ZeRO or none.

state-00001-of-00002.safetensors    pieces of rank 1 of 2; tensor `name:key:start`
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from arlon_ray.artifact import let_others_read

STEPS, CHECKSUM = "steps", "crc32"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + n) of a flattened tensor; `values` [n] is a view that `SavedState.fill` writes to."""

    name: str
    key: str
    start: int
    values: Tensor

    def under(self, key: str, values: Tensor) -> Piece:
        """Another tensor for the same elements."""
        return Piece(self.name, key, self.start, values)


def whole(name: str, key: str, tensor: Tensor) -> Piece:
    """A whole tensor as one piece."""
    return Piece(name, key, 0, tensor.detach().view(-1))


def frozen_parts(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters of which none trains: they come from artefacts of their own."""
    found = {}
    for name, part in module.named_children():
        trains = [parameter.requires_grad for parameter in part.parameters()]
        if trains and not any(trains):
            found[name] = part
    return found


def buffers(module: nn.Module) -> list[Piece]:
    """The buffers that belong to the state of what trains: codebooks, statistics."""
    frozen = tuple(f"{name}." for name in frozen_parts(module))
    kept = module.state_dict().keys()
    return [
        whole(name, "buffer", value)
        for name, value in module.named_buffers()
        if name in kept and not name.startswith(frozen)
    ]


def write_state(folder: Path, pieces: Iterable[Piece], steps: int, rank: int = 0, world: int = 1) -> None:
    """Write this rank's file into an existing folder, and look at what was written.

    `steps`: updates that the optimizer has made. Raises OSError where it cannot be written.
    """
    path = folder / f"state-{rank:05d}-of-{world:05d}.safetensors"
    # copies: safetensors refuses tensors that share memory, as pieces of one flat partition do
    tensors = {
        f"{piece.name}:{piece.key}:{piece.start}": piece.values.detach().to("cpu", copy=True) for piece in pieces
    }
    save_file(tensors, path, {STEPS: str(steps), CHECKSUM: str(_checksum(sorted(tensors.items())))})
    let_others_read(path)
    with safe_open(path, "pt") as written:
        if len(written.keys()) != len(tensors):
            raise OSError(f"{path}: {len(written.keys())} of {len(tensors)} tensors can be read back")


def _checksum(tensors: Iterable[tuple[str, Tensor]]) -> int:
    """CRC-32 of names and values, in this order."""
    checksum = 0
    for name, values in tensors:
        checksum = zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(name.encode(), checksum))
    return checksum


STATE_FILES = "state-*-of-*.safetensors"


def is_complete(names: Iterable[str]) -> bool:
    """Whether the files of all workers are among these names."""
    ours = [name for name in names if fnmatch(name, STATE_FILES)]
    return bool(ours) and len(ours) == _world_of(ours[0])


def _world_of(name: str) -> int:
    return int(name.removesuffix(".safetensors").rpartition("-")[2])


class SavedState:
    """What all workers wrote into a folder. Raises ValueError if a file is missing, SafetensorError if one is cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._files: list[tuple[Path, Any]] = []
        paths = sorted(folder.glob(STATE_FILES))
        world = _world_of(paths[0].name) if paths else 1
        if len(paths) != world:
            raise ValueError(f"{len(paths)} of {world} files of the workers' state are there")
        self.steps = 0
        for path in paths:
            file = safe_open(path, "pt")
            self._files.append((path, file))
            self.steps = max(self.steps, int(file.metadata()[STEPS]))
            for full in file.keys():  # noqa: SIM118 (a file, not a dict)
                name, key, start = full.rsplit(":", 2)
                count = file.get_slice(full).get_shape()[0]
                self._pieces.setdefault((name, key), []).append((int(start), count, file, full))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Read this worker's share of the files. Raises ValueError where one is not what was written."""
        for path, file in self._files[rank::world]:
            tensors = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            # states of earlier versions have no checksum
            if (wanted := file.metadata().get(CHECKSUM)) is not None and int(wanted) != _checksum(tensors):
                raise ValueError(f"{path.name} is not what was written: its checksum is another one")

    def names(self, key: str) -> set[str]:
        """Which tensors have something under `key`."""
        return {name for name, kind in self._pieces if kind == key}

    def has(self, name: str, key: str) -> bool:
        """Whether something was kept for `name` under `key`."""
        return (name, key) in self._pieces

    def fill(self, pieces: Iterable[Piece]) -> None:
        """Copy what was saved into the pieces. Raises KeyError where elements are missing."""
        for piece in pieces:
            first, end, filled = piece.start, piece.start + len(piece.values), 0
            for start, count, file, full in self._pieces.get((piece.name, piece.key), ()):
                low, high = max(first, start), min(end, start + count)
                if low < high:
                    part = file.get_slice(full)[low - start : high - start]
                    piece.values[low - first : high - first].copy_(part)
                    # in order, so that a gap stays one
                    filled = max(filled, high - first) if low - first <= filled else filled
            if filled < len(piece.values):
                raise KeyError(f"{piece.name}: {piece.key} is not in {self.folder}, or not all of it")

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Give `module` the trained weights, averaged where there is an average, and the buffers.

        Raises KeyError where something that trains, or a buffer, is missing or is left over.
        """
        key = "average" if self.names("average") else "parameter"
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        if different := set(trained) ^ self.names(key):
            raise KeyError(f"the checkpoint does not fit the model: {', '.join(sorted(different)[:5])}")
        self.fill(whole(name, key, value) for name, value in trained.items())
        self.fill(buffers(module))
