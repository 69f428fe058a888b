"""The library that the tests of this folder call, built for this processor and for older ones that it can stand for."""

from __future__ import annotations

import ctypes
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from arlon_ray import native

#: A processor, as the compiler calls it, and what of /proc/cpuinfo it needs: AVX2 without AVX-512, halves without AVX2,
#: none of them.
OLDER = {"haswell": {"avx2", "fma", "bmi2"}, "ivybridge": {"avx", "f16c"}, "x86-64": set()}


@pytest.fixture(params=["native", *OLDER])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    processor = request.param
    if shutil.which(native._COMMAND[0]) is None:
        pytest.skip("no compiler here")
    if processor in OLDER:
        if platform.machine() != "x86_64":
            pytest.skip("another family of processors")
        if not OLDER[processor] <= set(Path("/proc/cpuinfo").read_text().split()):
            pytest.skip(f"this processor cannot do what {processor} does")
    command = [f"-march={processor}" if part.startswith("-march=") else part for part in native._COMMAND]
    monkeypatch.setattr(native, "_COMMAND", tuple(command))
    native.library.cache_clear()
    library = native.library()
    assert library is not None, f"not built for {processor}"
    yield library
    monkeypatch.undo()
    native.library.cache_clear()
