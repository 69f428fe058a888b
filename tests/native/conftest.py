"""The library that the tests of this folder call."""

from __future__ import annotations

import ctypes

import pytest

from arlon_ray import native


@pytest.fixture
def built() -> ctypes.CDLL:
    library = native.library()
    if library is None:
        pytest.skip("no compiler here")
    return library
