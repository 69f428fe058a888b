"""The operation that DeepSpeed builds for collectives on a CPU, built so that no killed worker can block later ones.

It is built in a folder of this project, unless TORCH_EXTENSIONS_DIR names one. torch marks a build by a file named
`lock`, which whoever builds removes. A worker that is killed meanwhile leaves it, and every later training on the
machine would wait for it without end and without a word. A lock of the kernel ends with its process: whoever holds that
knows that a mark found there is nobody's.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory


def extensions_folder() -> Path:
    """Where operations are built by this Python and torch."""
    version = f"py{sys.version_info.major}{sys.version_info.minor}_torch{torch.__version__}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"~/.cache/arlon/torch_extensions/{version}").expanduser()


def build_shared_memory_op(device: torch.device) -> None:
    """Build and load it, one process of this project at a time; DeepSpeed takes what is loaded."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder") if device.type == "cpu" else None
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    folder = Path(_get_build_directory(builder.name, False))
    with (folder / "arlon-ray.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)
