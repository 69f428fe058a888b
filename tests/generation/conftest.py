"""A generator with random weights, for what does not look at pictures."""

from __future__ import annotations

import pytest

from arlon_ray.generation import VideoGenerator
from tests.bundles import make_random_bundle


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_bundle(make_random_bundle(tmp_path_factory.mktemp("bundle") / "b"))
