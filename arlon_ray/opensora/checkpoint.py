"""Public checkpoints, read one tensor at a time: safetensors or PyTorch files, single or sharded, from a folder or hub.

Nothing is unpickled but tensors (`weights_only`), and no file is held in memory as a whole.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arlon_ray.artifact import ArtifactError, one_line, read_object

#: Weights of a folder, in the order in which they are looked for; each may be one file, or shards with an index.
NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin",
         "ema.pt")  # fmt: skip
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
#: Where training scripts keep the state dict within what they save.
WRAPPERS = ("state_dict", "ema", "model", "module")
BESIDES = ("*.json", "*.model")


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: the file that holds it, and its shape."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def locate(source: str, flag: str) -> Path:
    """A file or folder on this machine, or a hub repository ("owner/name"), which is downloaded or in the cache.

    Raises ArtifactError, with `flag` in it, if it is neither.
    """
    if not source.strip():
        raise ArtifactError(f"{flag}: empty; expected a file, a folder, or a hub name (owner/name)")
    path = Path(source).expanduser()
    if path.exists():
        return path.absolute()
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ArtifactError(f"{flag} {source}: not found; expected a file, a folder, or a hub name (owner/name)")
    from huggingface_hub import snapshot_download

    def download(*suffixes: str) -> Path:
        patterns = [*BESIDES, *(f"*{suffix}" for suffix in suffixes)]
        return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))

    try:
        folder = download(".safetensors")
        return folder if any(folder.glob("*.safetensors")) else download(*TORCH_SUFFIXES)
    except Exception as error:  # the hub's client raises its own errors, and those of three HTTP libraries
        raise ArtifactError(
            f"{flag} {source}: no such file or folder here, and the hub did not give it: {one_line(error)}"
        ) from None


class Checkpoint:
    """The tensors of a public checkpoint, by name; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """`path` is a file, or a folder with weights of the usual names. Raises ArtifactError."""
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        for file, expected in _files(path):
            found = self._contents(file)
            for name in expected:
                if name not in found:
                    raise ArtifactError(f"{file}: tensor {name} is missing, which the index says is in this file")
            self.tensors |= found
        self._prefix = "module." if all(name.startswith("module.") for name in self.tensors) else ""
        self.tensors = {name.removeprefix(self._prefix): stored for name, stored in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        """Files with weights, each once."""
        return sorted({stored.file for stored in self.tensors.values()})

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` beside the weights; empty if there is none. Raises ArtifactError if it is damaged."""
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return read_object(file) if file.is_file() else {}

    def read(self, name: str) -> Tensor:
        """One tensor. Files are opened for it anew, so that what was read before does not stay mapped."""
        file, name = self.tensors[name].file, self._prefix + name
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)
        return self._state_dict(file)[name]

    def _contents(self, file: Path) -> dict[str, Stored]:
        if file.suffix == ".safetensors":
            return dict(_header(file))
        state = self._state_dict(file)
        return {name: Stored(file, tuple(value.shape), value.dtype) for name, value in state.items()}

    def _state_dict(self, file: Path) -> Mapping[str, Tensor]:
        """A PyTorch file's tensors, mapped into memory; the file read last stays open."""
        if self._opened is None or self._opened[0] != file:
            self._opened = None
            self._opened = (file, _unwrapped(_unpickled(file), file))
        return self._opened[1]


def _files(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Files of weights, with the tensors that an index says are in each (none: whatever is in it)."""
    if path.is_file():
        yield path, []
        return
    for name in NAMES:
        if (path / f"{name}.index.json").is_file():
            yield from _indexed(path, path / f"{name}.index.json")
            return
        if (path / name).is_file():
            yield path / name, []
            return
    others = sorted(file for suffix in (".safetensors", *TORCH_SUFFIXES) for file in path.glob(f"*{suffix}"))
    if len(others) != 1:
        found = f"found {', '.join(file.name for file in others[:4])}" if others else "found no weights"
        raise ArtifactError(f"{path}: {found}; expected {', '.join(NAMES)} (or its .index.json), or name the file")
    yield others[0], []


def _indexed(folder: Path, index: Path) -> Iterator[tuple[Path, list[str]]]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ArtifactError(f"{index}: damaged: expected a weight_map of tensor names to files")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ArtifactError(f"{index}: shard {shard!r} is not the name of a file beside it")
        names = [name for name, its in weight_map.items() if its == shard]
        if not (folder / shard).is_file():
            raise ArtifactError(
                f"{folder / shard}: missing; the index expects {len(names)} tensors there ({names[0]}, …)"
            )
        yield folder / shard, names


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """Names, shapes and types of a safetensors file. Raises ArtifactError for a file that is cut short, or is none."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= size - 8 else None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: no safetensors file: {one_line(error)}") from None
    if not isinstance(header, dict):
        raise ArtifactError(
            f"{file}: no safetensors file (a Git LFS pointer?), or cut short in its header ({size} bytes)"
        )
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        try:
            end = 8 + length + int(entry["data_offsets"][1])
        except (KeyError, TypeError, IndexError, ValueError):
            raise ArtifactError(f"{file}: no safetensors file: its entry for {name} has no offsets") from None
        if end > size:
            raise ArtifactError(
                f"{file}: cut short: tensor {name} ends at byte {end}, found {size} bytes; download it again"
            )
    try:
        with safe_open(file, framework="pt") as opened:
            for name in tensors:
                part = opened.get_slice(name)
                if (kind := part.get_dtype()) not in DTYPES:
                    raise ArtifactError(f"{file}: tensor {name} is of type {kind}, expected one of {', '.join(DTYPES)}")
                yield name, Stored(file, tuple(part.get_shape()), DTYPES[kind])
    except SafetensorError as error:
        raise ArtifactError(f"{file}: cannot be read: {one_line(error)}") from None


#: Types of safetensors files.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _unpickled(file: Path) -> Any:
    if file.suffix not in TORCH_SUFFIXES:
        raise ArtifactError(f"{file}: expected .safetensors, or one of {', '.join(TORCH_SUFFIXES)}")
    with file.open("rb") as opened:
        if opened.read(20).startswith(b"version https://git"):
            raise ArtifactError(f"{file}: a Git LFS pointer, not the weights: fetch them (git lfs pull)")
    try:
        try:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # written before PyTorch 1.6
    except pickle.UnpicklingError:
        raise ArtifactError(
            f"{file}: holds Python objects other than tensors, which are not loaded; expected a state dict"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ArtifactError(f"{file}: cut short, or no PyTorch file: {one_line(error)}") from None


def _unwrapped(value: Any, file: Path) -> Mapping[str, Tensor]:
    """The state dict in what a training script saved."""
    while isinstance(value, dict) and not all(isinstance(entry, Tensor) for entry in value.values()):
        inner = next((value[name] for name in WRAPPERS if isinstance(value.get(name), dict)), None)
        if inner is None:
            break
        value = inner
    names = isinstance(value, dict) and value and all(isinstance(name, str) for name in value)
    if not names or not all(isinstance(entry, Tensor) for entry in value.values()):
        what = f"a {type(value).__name__}" if not isinstance(value, dict) else f"keys {sorted(map(str, value))[:3]}"
        raise ArtifactError(f"{file}: holds {what}: expected a state dict (names to tensors)")
    return value
