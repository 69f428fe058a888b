"""The operation that DeepSpeed builds for collectives on a CPU, built so that no killed worker can block later ones.

torch marks a build by a file named `lock`, which whoever builds removes. A worker that is killed meanwhile leaves it,
and every later training on the machine would wait for it without end and without a word. A lock of the kernel ends with
its process: whoever holds that knows that a mark found there is nobody's.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory


def build_shared_memory_op(device: torch.device) -> None:
    """Build and load it, one process of this project at a time; DeepSpeed takes what is loaded."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder") if device.type == "cpu" else None
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, False))
    with (folder / "arlon-ray.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)
