"""Starting Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
from arlon_ray.config import load_config
from jobs.command_line import run
from jobs.ray_session import connect

def main():
    with connect(load_config("tiny")):
        print("connected")

run(main)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_is_too_busy_for_ray_is_told_in_one_line() -> None:
    """A node that gets no time at all: its process is stopped as soon as it is there."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", JOB], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as job:
        nodes: list[psutil.Process] = []
        while job.poll() is None and not nodes:
            found = psutil.Process(job.pid).children(recursive=True)
            nodes = [process for process in found if process.name() == "raylet"]
            time.sleep(0.01)
        for node in nodes:
            node.suspend()
        told = job.stderr.read() if job.stderr else ""
        for node in nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                node.kill()
    assert job.returncode == os.EX_TEMPFAIL, told
    assert "stopped: Ray did not start within its 30 seconds: this machine is too busy" in told
    assert "Traceback" not in told
