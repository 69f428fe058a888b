"""Models' steps on a CPU in float32 as calls of C++, where a compiler is at hand: the AR's here, the DiT's in `dit`.

A small model's step is a hundred small operations, and calling them takes longer than what they compute. The C++ beside
this is built once for this processor and this text of it, in seconds, and kept in the user's cache; where that does not
work, torch's operations stand, which is said once in the log. Its sums do not depend on rows beside or on threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import cache
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCES = tuple(Path(__file__).with_name(name) for name in ("ar.cpp", "dit.cpp"))
_HEADER = Path(__file__).with_name("common.h")
#: Outputs of a panel of weights.
LANES = 8
_COMMAND = ("g++", "-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
_BUILD_SECONDS = 120
#: Of what it exports, the arguments: pointers, 64-bit integers, floats, an int.
_ARGUMENTS = {
    "product": "pnnpnppfpi",
    "kinds": "",
    "trunk": "ppni",
    "block": "ppnnpppi",
    "modulated": "pnnfnpnpnpnpi",
    "gelu_in_place": "pni",
    "self_attention": "ppnnppfpppi",
    "cross_attention": "pnnnnppnppi",
}
_KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}


@cache
def library() -> ctypes.CDLL | None:
    """What the C++ exports; None, said in the log, where it cannot be built or loaded."""
    try:
        try:
            built = ctypes.CDLL(str(_built(Path.home() / ".cache" / "arlon_ray")))
        except OSError:  # a home that cannot be written to, or shared with a machine of other libraries
            built = ctypes.CDLL(str(_built(Path(tempfile.mkdtemp(prefix="arlon-native-")))))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        getLogger(__name__).warning(
            "no C++ for the steps of AR and DiT (%s): they go on with torch's operations, slower; it takes g++",
            *reason,
        )
        return None
    for name, kinds in _ARGUMENTS.items():
        getattr(built, name).argtypes = [_KINDS[kind] for kind in kinds]
        getattr(built, name).restype = ctypes.c_int if name == "kinds" else None
    return built


def _built(folder: Path) -> Path:
    """The library's file, built if it is not there. Several may do so at a time: the last one's stays."""
    cpu = Path("/proc/cpuinfo")
    known = [line for line in cpu.read_text().splitlines() if line.startswith(("model name", "flags", "Features"))]
    texts = [path.read_text() for path in (_HEADER, *SOURCES)]
    content = [*texts, *_COMMAND, platform.machine(), *sorted(set(known))]
    path = folder / f"native-{hashlib.sha256(chr(10).join(content).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / path.name
            command = [*_COMMAND, *map(str, SOURCES), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
            os.replace(built, path)
    return path


class Weights(ctypes.Structure):
    """As in ar.cpp."""

    _fields_ = [("panels", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("kind", ctypes.c_int64)]


class Panels:
    """Weights as `ar.cpp` reads them: [O/8, C, 8] and, of int8, a scale for each output; zeros fill up the last panel.

    Floats that halves or bfloat16 say exactly are kept as such: products are the same and read half of the memory.
    """

    def __init__(self, built: ctypes.CDLL, weight_OC: Tensor, scale_O: Tensor | None = None) -> None:
        missing = -len(weight_OC) % LANES
        whole = F.pad(_narrow(weight_OC, built.kinds()), (0, 0, 0, missing))
        self.numbers = whole.unflatten(0, (-1, LANES)).mT.contiguous()
        self.scale = None if scale_O is None else F.pad(scale_O.float(), (0, missing))
        self.weights = Weights(address(self.numbers), address(self.scale), _STORED.index(self.numbers.dtype))

    def __len__(self) -> int:
        """Outputs, those that fill up the last panel too."""
        return len(self.numbers) * LANES


#: What weights are kept as, by the number of the kind in ar.cpp.
_STORED = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def _narrow(weight: Tensor, kinds: int) -> Tensor:
    """The same numbers in the first of the `kinds` (bits) of two bytes that says them exactly, or as they are."""
    if weight.dtype is torch.float32:
        for kind in (1, 2):
            if kinds & 1 << kind and _says(_STORED[kind], weight):
                return weight.to(_STORED[kind])
    return weight


def _says(dtype: torch.dtype, weight: Tensor) -> bool:
    # most weights that do not fit are found out by the first ones
    return all(torch.equal(part, part.to(dtype).float()) for part in (weight[:1], weight))


def in_turns(rows: Tensor) -> Tensor:
    """Of two halves (gate and up, [2·H, …]) eight rows each in turns: their panels then lie beside each other."""
    return rows.unflatten(0, (2, -1, LANES)).transpose(0, 1).flatten(0, 2)


def address(tensor: Tensor | None) -> int | None:
    """Where its numbers begin, one behind the other."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def threads(work: int, enough: int = 2**20) -> int:
    """How many share so many multiplications: each has enough to do, for waiting for one another costs as well."""
    return min(torch.get_num_threads(), 1 + work // enough)


def product(
    built: ctypes.CDLL, x_RC: Tensor, panels: Panels, outputs: int,
    added_RO: Tensor | None = None, norm_C: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """x · weightᵀ (+ added), of x as it is or normed: x · rsqrt(Σx² + eps) · norm. [R, outputs]."""
    x_RC = x_RC.contiguous()
    (rows, inputs), whole = x_RC.shape, len(panels)
    if added_RO is not None:
        added_RO = added_RO.contiguous() if whole == outputs else F.pad(added_RO, (0, whole - outputs))
    out = torch.empty(rows, whole)
    built.product(
        address(x_RC), rows, inputs, ctypes.byref(panels.weights), whole, address(added_RO),
        address(norm_C), eps, address(out), threads(rows * inputs * whole),
    )  # fmt: skip
    return out if whole == outputs else out[:, :outputs]
