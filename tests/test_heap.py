"""Threads that share the process's heap keep what they freed: a model in a thread does not fault it in again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading, torch
from arlon_ray.heap import share_one_heap
if sys.argv[1] == "shared":
    share_one_heap()

def step():
    parts = [torch.ones(1_500_000) for _ in range(40)]  # 6 MB each
    return sum(float(part[0]) for part in parts)

def work():
    torch.set_num_threads(1)
    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
def test_a_thread_keeps_its_memory() -> None:
    faults = {}
    for mode in ("own", "shared"):
        ended = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(ended.stdout)
    assert faults["shared"] < 0.5 * faults["own"], faults
