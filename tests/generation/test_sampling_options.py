"""Solvers, guidance interval, cached layers: off they change no bit, on they save what they say, in batches too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from arlon_ray.config import SamplingConfig, Solver, load_config
from arlon_ray.config.load import ConfigError
from arlon_ray.diffusion.rectified_flow import schedule, time_ratio
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.generation.guidance import StepCache
from arlon_ray.generation.overlapped import computing_with
from arlon_ray.generation.rendering import DenoisingBatch
from arlon_ray.models.dit import LateLayers, STDiT3
from tests.bundles import make_random_bundle, randomized, small_config
from tests.generation.test_batching import renderings, together

STEPS = 6


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_bundle(make_random_bundle(tmp_path_factory.mktemp("bundle") / "b", "dit.depth=3"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """And so one lane: all rows pass through a block together."""
    with computing_with(1):
        yield


def render(generator: VideoGenerator, on_step: Any = None, **changes: object) -> np.ndarray:
    options = default_options(generator.bundle.config.sampling, **{"steps": STEPS, **changes})
    tokens = np.arange(160, dtype=np.int32).reshape(10, 4, 4) % 32
    return generator.renderer.render("a red circle moves", tokens, None, 0, 0, options, on_step).latents


@contextmanager
def rows_of(block: nn.Module) -> Iterator[list[int]]:
    """How many rows each of the block's passes has."""
    rows: list[int] = []
    hook = block.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        yield rows
    finally:
        hook.remove()


def times_of(generator: VideoGenerator, steps: int = STEPS) -> list[float]:
    """Of Euler's evaluations, 1 to 0."""
    config = generator.bundle.config
    ratio = time_ratio(config.video.height, config.video.width, config.segment.latents, config.dit.time_base_pixels)
    return [time / 1000 for time in schedule(steps, ratio)]


def test_all_kinds_are_rendered_together_as_if_alone(generator: VideoGenerator) -> None:
    """Other solvers, intervals and caches beside each other, which begin at different steps."""
    intervals = [{}, {"guidance_low": 0.5}, {"guidance_high": 0.8, "guidance_low": 0.3}]
    caches = [{}, {"cache_layers": 1}, {"cache_layers": 2, "cache_every": 3}, {"cache_layers": 1, "cache_every": 3}]
    asked = []
    for number, (*others, options) in enumerate(renderings(generator, 0) * 2):
        solver = get_args(Solver)[number % 5]
        asked.append((*others, default_options(options, solver=solver, **intervals[number % 3], **caches[number % 4])))
    alone = [generator.renderer.render(*each).latents for each in asked]
    arrivals = np.random.default_rng(1).integers(0, 8, len(asked)).tolist()
    beside = together(DenoisingBatch(7), [generator.renderer.rendering(*each) for each in asked], arrivals)
    for one, other in zip(alone, beside, strict=True):
        assert np.array_equal(one, other.latents)


@pytest.mark.parametrize("solver", get_args(Solver))
def test_every_evaluation_is_announced(generator: VideoGenerator, solver: Solver) -> None:
    heard: list[int] = []
    with rows_of(generator.renderer.dit.spatial_blocks[0]) as rows:
        latents = render(generator, heard.append, solver=solver, guidance_scale=2.0)
    evaluations = SamplingConfig(steps=STEPS, solver=solver).evaluations
    assert heard == list(range(evaluations)) and rows == [2] * evaluations
    assert solver == "euler" or np.abs(latents - render(generator)).max() > 1e-4


def test_guidance_is_paid_for_within_the_interval_alone(generator: VideoGenerator) -> None:
    guided = {"guidance_scale": 3.0, "token_guidance_scale": 2.0}
    times, block = times_of(generator), generator.renderer.dit.spatial_blocks[0]
    for low, high in ((0.0, 1.0), (times[3], times[1]), (times[2], 1.0), (0.0, 0.0)):
        with rows_of(block) as rows:
            render(generator, **guided, guidance_low=low, guidance_high=high)
        assert rows == [3 if low <= time <= high else 1 for time in times]
    never = render(generator, **guided, guidance_high=0.0)
    assert np.allclose(never, render(generator, guidance_scale=1.0, token_guidance_scale=1.0), atol=1e-5)
    always = render(generator, **guided)
    assert np.array_equal(always, render(generator, **guided, guidance_low=times[-1], guidance_high=times[0]))
    part = render(generator, **guided, guidance_low=times[2])
    assert min(np.abs(part - other).max() for other in (never, always)) > 1e-4


def test_shifted_times_have_less_noise(generator: VideoGenerator) -> None:
    def times(**changes: object) -> list[float]:
        options, found = default_options(generator.bundle.config.sampling, steps=STEPS, **changes), list[float]()
        member = next(generator.renderer.rendering("a", np.zeros((10, 4, 4), np.int32), None, 0, 0, options))
        while not member.path.ended:
            found.append(member.path.time / 1000)
            member.path.advance(torch.zeros_like(member.path.x))
        return found

    assert times() == pytest.approx(times_of(generator))
    shifted = times(time_shift=0.2)
    assert shifted[0] == 1 and all(a < b for a, b in zip(shifted[1:], times()[1:], strict=True))
    # odds t/(1 − t) are what the ratio multiplies
    assert shifted[1] / (1 - shifted[1]) == pytest.approx(0.2 * times()[1] / (1 - times()[1]))


def test_late_layers_are_computed_every_nth_evaluation(generator: VideoGenerator) -> None:
    plain, dit = render(generator, steps=7), generator.renderer.dit
    assert np.array_equal(plain, render(generator, steps=7, cache_layers=2, cache_every=1))
    for layers, every in ((1, 2), (2, 3)):
        with rows_of(dit.temporal_blocks[2 - layers]) as early, rows_of(dit.spatial_blocks[3 - layers]) as late:
            latents = render(generator, steps=7, cache_layers=layers, cache_every=every)
        assert len(early) == 7 and len(late) == -(-7 // every)
        assert 0 < np.linalg.norm(latents - plain) < 0.2 * np.linalg.norm(plain)


def test_what_late_layers_added_is_added_again() -> None:
    config = small_config("dit.depth=3").dit
    dit = STDiT3(config).eval().requires_grad_(False)
    dit.load_state_dict(randomized(dit, 0))
    shape, coarse = (5, 4, 4), torch.randn(2, 8, 5, 4, 4)
    text = torch.randn(2, 7, config.caption_channels)
    condition = dit.condition(shape, text, torch.ones(2, 7) > 0, torch.full((2,), 16.0), (64, 64), coarse)
    noisy = torch.ones(2, 5, dtype=torch.bool)

    def denoise(x: torch.Tensor, late: LateLayers | None) -> torch.Tensor:
        times = dit.times(torch.full((2,), 500.0), condition.fps_BD, noisy)
        return dit.denoise(dit.embed(x), shape, times, condition, noisy, late)

    x, y = torch.randn(2, 8, 5, 4, 4), torch.randn(2, 8, 5, 4, 4)
    late = LateLayers(2)
    assert torch.equal(denoise(x, None), denoise(x, late)) and late.added is not None
    assert torch.allclose(denoise(x, None), denoise(x, late), atol=1e-5)
    assert not torch.allclose(denoise(y, None), denoise(y, late), atol=1e-2)
    # with nothing kept of them, the late layers are not there at all
    first = {name: value for name, value in dit.state_dict().items() if "_blocks." not in name or "_blocks.0." in name}
    shallow = STDiT3(config.model_copy(update={"depth": 1})).eval().requires_grad_(False)
    assert not [name for name in shallow.load_state_dict(first, strict=False).missing_keys if "injection" not in name]
    shallow.injection = dit.injection
    expected = denoise(y, LateLayers(2, torch.zeros_like(late.added)))
    dit = shallow
    condition = dit.condition(shape, text, torch.ones(2, 7) > 0, torch.full((2,), 16.0), (64, 64), coarse)
    condition.injection.pop("1", None)
    assert torch.equal(denoise(y, None), expected)


def test_fewer_rows_are_the_first_and_more_are_computed_anew() -> None:
    cache = StepCache(1, 4)
    late = cache.at(0, 3)
    assert late is not None and late.added is None
    late.added = torch.arange(3.0)
    assert torch.equal(cache.at(1, 1).added, torch.tensor([0.0]))  # type: ignore[union-attr, arg-type]
    assert cache.at(2, 3).added is None  # type: ignore[union-attr]
    late.added = torch.arange(3.0)
    assert cache.at(3, 3).added is not None and cache.at(4, 3).added is None  # type: ignore[union-attr]
    assert StepCache(0, 2).at(1, 2) is None


def test_what_does_not_fit_is_refused(generator: VideoGenerator) -> None:
    with pytest.raises(ValueError, match="cache_layers=3: expected at most 2 of 3 layers"):
        render(generator, cache_layers=3)
    for override, words in (
        ("sampling.cache_layers=3", "must be below dit.depth=3"),
        ("sampling={guidance_low: 0.7, guidance_high: 0.5}", "guidance_low=0.7 is above guidance_high=0.5"),
        ("sampling.solver=rk4", "solver"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config("tiny", [override])
