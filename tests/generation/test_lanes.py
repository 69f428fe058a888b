"""Rows in lanes: the same as in one, on threads of their own, and errors that reach whoever asked."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon_ray.bundle import load_bundle
from arlon_ray.generation import DiTRenderer, default_options
from arlon_ray.generation.lanes import in_lanes, lanes, side_by_side
from tests.bundles import make_random_bundle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("more", [{}, {"cache_layers": 1}, {"token_guidance_scale": 2.0}, {"guidance_low": 0.5}])
def test_a_segment_is_the_same_as_with_one_thread(tmp_path: Path, more: dict[str, float]) -> None:
    renderer = DiTRenderer(load_bundle(make_random_bundle(tmp_path / "bundle")))
    config = renderer.config
    assert renderer.codec is not None
    tokens = np.zeros(renderer.codec.grid(config.segment.latents, *config.latent_grid), np.int32)
    options = default_options(config.sampling, steps=4, **more)  # type: ignore[arg-type]

    def rendered() -> np.ndarray:
        return renderer.render("a red circle moves", tokens, None, 3, 0, options).latents

    in_two = rendered()
    torch.set_num_threads(1)
    assert np.array_equal(rendered(), in_two)


def test_lanes_share_the_threads_of_whoever_asks() -> None:
    assert lanes(4) == [slice(0, 4)]
    seen: dict[str, int] = {}

    def look() -> bool:
        seen[threading.current_thread().name] = torch.get_num_threads()
        return torch.is_grad_enabled()

    torch.set_num_threads(2)
    with torch.no_grad(), in_lanes(CPU):
        assert lanes(1) == [slice(0, 1)] and lanes(3) == [slice(0, 2), slice(2, 3)]
        assert side_by_side([look, look]) == [False, False]
    assert list(seen.values()) == [1, 1] and torch.get_num_threads() == 2
    for device, threads in ((torch.device("meta"), 2), (CPU, 1), (CPU, 4)):
        torch.set_num_threads(threads)
        with in_lanes(device):
            assert lanes(4) == [slice(0, 4)] and torch.get_num_threads() == threads


def test_an_error_of_any_lane_is_raised_when_all_have_ended() -> None:
    ended = threading.Event()

    def bad() -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        side_by_side([bad, ended.set])
    assert ended.is_set()
    with pytest.raises(ValueError, match="bad"):
        side_by_side([ended.clear, bad])
    assert not ended.is_set()


def test_a_forked_process_has_lanes_of_its_own() -> None:
    assert side_by_side([lambda: 1, lambda: 2]) == [1, 2]
    if not (child := os.fork()):
        os._exit(0 if side_by_side([lambda: 1, lambda: 2]) == [1, 2] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
