"""A worker that was killed while DeepSpeed's operation was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Leaves the mark of a build that was killed, and builds.
PROGRAM = """
import torch
from deepspeed.ops.op_builder.builder import OpBuilder
from jobs.shared_memory_op import build_shared_memory_op, extensions_folder
mark = extensions_folder() / "deepspeed_shm_comm" / "lock"
mark.parent.mkdir(parents=True, exist_ok=True)
mark.touch()
build_shared_memory_op(torch.device("cpu"))
print(sorted(OpBuilder._loaded_ops), not mark.exists())
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_mark_of_a_killed_build_blocks_nobody() -> None:
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ended = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "deepspeed_shm_comm" in ended.stdout and ended.stdout.rstrip().endswith("True")
