"""A process that keeps what it freed does not fault it in again, in a thread either; the user's own settings stay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from arlon_ray.heap import heap_environment

PROGRAM = """
import resource, threading, torch
from arlon_ray.heap import keep_freed_memory
keep_freed_memory()

def step():
    parts = [torch.ones(size) for size in (1_500_000,) * 30 + (15_000_000,)]  # 6 MB and 60 MB: 59,000 pages together
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


def faults(**settings: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, env={**plain, **settings}, capture_output=True, text=True, check=True)
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
def test_a_thread_keeps_its_memory() -> None:
    assert faults() < 3_000
    # the user wants memory given back at once
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 100_000


def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    assert heap_environment()["MALLOC_ARENA_MAX"] == "1"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    assert heap_environment() == {}
