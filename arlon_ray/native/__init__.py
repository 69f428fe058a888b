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
    "trunk": "ppni",
    "draw": "pnnppppppi",
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
        getattr(built, name).argtypes, getattr(built, name).restype = [_KINDS[kind] for kind in kinds], None
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


def panels(weight_OC: Tensor) -> Tensor:
    """The weights as [O/8, C, 8]; zeros fill up the last panel."""
    return F.pad(weight_OC, (0, 0, 0, -len(weight_OC) % LANES)).unflatten(0, (-1, LANES)).mT.contiguous()


def panels_in_turns(weight_OC: Tensor) -> Tensor:
    """The same of the two halves of the weights (gate and up), whose panels take turns."""
    return panels(weight_OC.unflatten(0, (2, -1, LANES)).transpose(0, 1).flatten(0, 2))


def address(tensor: Tensor | None) -> int | None:
    """Where its numbers begin, one behind the other."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def threads(work: int, enough: int = 2**20) -> int:
    """How many share so many multiplications: each has enough to do, for waiting for one another costs as well."""
    return min(torch.get_num_threads(), 1 + work // enough)


def product(
    built: ctypes.CDLL, x_RC: Tensor, panels: Tensor, outputs: int,
    added_RO: Tensor | None = None, norm_C: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """x · weightᵀ (+ added), of x as it is or normed: x · rsqrt(Σx² + eps) · norm. [R, outputs]."""
    x_RC = x_RC.contiguous()
    (rows, inputs), whole = x_RC.shape, len(panels) * LANES
    if added_RO is not None:
        added_RO = added_RO.contiguous() if whole == outputs else F.pad(added_RO, (0, whole - outputs))
    out = torch.empty(rows, whole)
    built.product(
        address(x_RC), rows, inputs, address(panels), whole, address(added_RO),
        address(norm_C), eps, address(out), threads(rows * inputs * whole),
    )  # fmt: skip
    return out if whole == outputs else out[:, :outputs]


def draw(
    built: ctypes.CDLL, logits_QK: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, numbers_Q: Tensor,
    fine_Q: Tensor,
) -> Tensor:  # fmt: skip
    """As `decoder.draw`, with the numbers of `Choice`. `fine_Q` turns false where logits are not finite."""
    logits_QK, numbers_Q = logits_QK.contiguous(), numbers_Q.contiguous()
    members, codes = logits_QK.shape
    tokens = torch.empty(members, dtype=torch.long)
    built.draw(
        address(logits_QK), members, codes, address(temperature), address(top_k), address(top_p),
        address(numbers_Q), address(fine_Q), address(tokens), threads(logits_QK.numel(), 2**14),
    )  # fmt: skip
    return tokens
