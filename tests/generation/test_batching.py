"""Requests that share steps: each comes out as it would alone, to the last bit, whoever joins, leaves or fails."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arlon_ray.config import ArConfig, SamplingConfig
from arlon_ray.generation import ChangingText, DiTRenderer, GenerationOptions, VideoGenerator, default_options
from arlon_ray.generation.batching import Batch, Member
from arlon_ray.generation.rendering import DenoisingBatch
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.models.ar import ArTransformer
from tests.bundles import make_random_bundle

Rendering = tuple[Any, ...]


@pytest.fixture(scope="module", params=[(), ("video.height=72", "video.width=88", "vqvae.fine.patch=[5,4,4]")])
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    """Of 8×8 latents, and of 9×11, which blocks and patches reach beyond."""
    return VideoGenerator.from_bundle(make_random_bundle(tmp_path_factory.mktemp("bundle") / "b", *request.param))


def changing(latents: int) -> ChangingText:
    """Blended over three frames."""
    first = tuple(min(1.0, max(0.0, (latents - 2 - frame) / 3)) for frame in range(latents))
    return ChangingText(("a", "a blue square falls"), (first, tuple(1 - share for share in first)))


def together(batch: Batch, requests: Sequence[Generator], arrivals: Sequence[int]) -> list[Any]:
    """Each request's result or error; it joins before step `arrivals[i]` or as soon as there is room after."""
    waiting = sorted(range(len(requests)), key=lambda i: arrivals[i])
    active: dict[int, tuple[int, Member]] = {}
    results: list[Any] = [None] * len(requests)

    def go_on(number: int, sent: Any = None) -> None:
        try:
            member = requests[number].send(sent)
            batch.join(member)
            active[id(member)] = number, member
        except StopIteration as ended:
            results[number] = ended.value

    step = 0
    while waiting or active:
        while waiting and arrivals[waiting[0]] <= step and batch.has_room():
            go_on(waiting.pop(0))
        for member in batch.step():
            number, _ = active.pop(id(member))
            if member.error is not None:
                results[number] = member.error
            else:
                go_on(number, member.result)
        step += 1
    return results


def renderings(generator: VideoGenerator, seed: int) -> list[Rendering]:
    """Arguments of `render`: of all kinds."""
    bundle, random = generator.bundle, np.random.default_rng(seed)
    sampling, segment, grid = bundle.config.sampling, bundle.config.segment, bundle.config.latent_grid
    shape, made = bundle.codec.grid(segment.latents, *grid), []
    for number in range(9):
        baseline = number % 4 == 3
        options = default_options(
            sampling, baseline=baseline, steps=int(random.integers(1, 7)),
            guidance_scale=[1.0, 2.0, 3.5][number % 3], token_guidance_scale=[1.0, 1.0, 2.0, 1.0, 1.5][number % 5],
            negative_prompt="a blurred picture" if number == 4 else "",
        )  # fmt: skip
        tokens = None if baseline else random.integers(0, 32, shape).astype(np.int32)
        overlap = random.normal(size=(8, [0, 1, 5][number % 3], *grid)).astype(np.float32)
        text = changing(segment.latents) if number in (2, 3) else "a red circle" + " that moves" * number
        made.append((text, tokens, overlap if overlap.shape[1] else None, 3, number, options))
    return made


@pytest.mark.parametrize("threads", [1, 2])
def test_segments_are_rendered_as_if_alone(generator: VideoGenerator, threads: int) -> None:
    renderer, before = generator.renderer, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed in range(3 if threads == 1 else 1):
            asked = renderings(generator, seed)
            alone = [renderer.render(*each).latents for each in asked]
            arrivals = np.random.default_rng(seed).integers(0, 6, len(asked)).tolist()
            batch = DenoisingBatch(5)
            beside = together(batch, [renderer.rendering(*each) for each in asked], arrivals)
            for one, other in zip(alone, beside, strict=True):
                assert np.array_equal(one, other.latents)
            assert not batch.members
    finally:
        torch.set_num_threads(before)


def test_two_models_are_not_mixed(generator: VideoGenerator, tmp_path: Path) -> None:
    other = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b", "dit.num_heads=4")).renderer
    if other.config.latent_grid != generator.bundle.config.latent_grid:
        pytest.skip("of another size")
    asked = renderings(generator, 0)[:2]
    batch = DenoisingBatch(4)
    requests = [renderer.rendering(*each) for renderer in (generator.renderer, other) for each in asked]
    expected = [renderer.render(*each) for renderer in (generator.renderer, other) for each in asked]
    for one, apart in zip(together(batch, requests, [0] * 4), expected, strict=True):
        assert np.array_equal(one.latents, apart.latents)


def test_one_that_fails_or_leaves_disturbs_no_other(generator: VideoGenerator) -> None:
    renderer, batch = generator.renderer, DenoisingBatch(4)
    asked = renderings(generator, 1)[:3]
    alone = [renderer.render(*each).latents for each in asked]
    steps: list[int] = []

    def stop(step: int) -> None:
        steps.append(step)
        if step == 1:
            raise InterruptedError

    text, tokens, _, *rest = renderings(generator, 1)[1]
    bad = np.full((8, 5, *generator.bundle.config.latent_grid), np.nan, np.float32)
    requests = [renderer.rendering(*each) for each in asked]
    requests += [renderer.rendering(text, tokens, bad, *rest)]
    requests += [renderer.rendering(*asked[0][:5], default_options(asked[0][5], steps=4), stop)]
    *fine, nan, stopped = together(batch, requests, [0, 1, 1, 0, 0])
    assert all(np.array_equal(one, other.latents) for one, other in zip(alone, fine, strict=True))
    assert isinstance(nan, FloatingPointError) and isinstance(stopped, InterruptedError) and steps == [0, 1]
    left = next(renderer.rendering(*asked[0]))
    batch.join(left)
    batch.leave(left)
    assert batch.step() == [] and not left.ended


def plans(generator: VideoGenerator, seed: int) -> list[tuple[list, int, GenerationOptions]]:
    """Arguments of `plan`: of all kinds."""
    sampling, latents = generator.bundle.config.sampling, generator.bundle.config.segment.latents
    made = []
    for number in range(8):
        options = default_options(
            sampling, ar_guidance_scale=[1.0, 1.5, 30.0][number % 3], temperature=[1.0, 0.7][number % 2],
            top_k=[0, 5][number // 2 % 2], top_p=[1.0, 0.9, 0.5][number % 3],
        )  # fmt: skip
        texts: list = ["a red circle" + " that moves" * number] * (1 + number % 4)
        made.append(([*texts, changing(latents), "b"] if number % 3 == 0 else texts, 10 * seed + number, options))
    return made


def planned_in(batch: Batch, generator: VideoGenerator, asked: Sequence, arrivals: Sequence[int], **more: Any) -> list:
    """The plans' tokens, made beside each other."""

    def whole(arguments: tuple) -> Generator:
        plan, made = generator.planner.begin(*arguments, **more), []
        for _ in arguments[0]:
            made.append((yield from plan.segment()).tokens)
        return made

    return together(batch, [whole(arguments) for arguments in asked], arrivals)


@pytest.mark.parametrize("threads", [1, 2])
def test_videos_are_planned_as_if_alone(generator: VideoGenerator, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = generator.planner.batch(5)
        memory = batch.decoder.cache.values.data_ptr(), batch.decoder.cache.values.shape
        for seed in range(2 if threads == 1 else 1):
            asked = plans(generator, seed)
            alone = [[plan.tokens for plan in generator.planner.plan(*each)] for each in asked]
            arrivals = np.random.default_rng(seed).integers(0, 20, len(asked)).tolist()
            for one, other in zip(alone, planned_in(batch, generator, asked, arrivals), strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert (batch.decoder.cache.values.data_ptr(), batch.decoder.cache.values.shape) == memory and batch.rows == 0
    finally:
        torch.set_num_threads(before)


def test_one_plan_that_fails_or_leaves_disturbs_no_other(generator: VideoGenerator) -> None:
    planner, batch = generator.planner, generator.planner.batch(4)
    asked = plans(generator, 0)[1:4]
    alone = [[plan.tokens for plan in planner.plan(*each)] for each in asked]
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 11:
            raise InterruptedError

    plan = planner.begin(["a"] * 3, 0, asked[0][2], stop)
    nan = planner.begin(["a"], 0, asked[0][2])
    sampling = next(poisoned := nan.segment())
    sampling.text = (sampling.text[0] * np.nan, sampling.text[1])

    def bad() -> Generator:
        yield sampling
        poisoned.close()

    def whole(arguments: tuple) -> Generator:
        each, made = planner.begin(*arguments), []
        for _ in arguments[0]:
            made.append((yield from each.segment()).tokens)
        return made

    requests = [bad(), plan.segment(), *(whole(each) for each in asked)]
    failed, stopped, *fine = together(batch, requests, [0, 1, 0, 2, 3])
    assert isinstance(failed, FloatingPointError) and isinstance(stopped, InterruptedError) and len(seen) == 11
    for one, other in zip(alone, fine, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="blocks: expected"):
        long = next(planner.begin(["a"], 0, asked[0][2]).segment())
        long.grid = (100, *long.grid[1:])
        batch.join(long)
    assert not batch.members


def test_a_place_is_clean_for_whoever_comes_next(generator: VideoGenerator) -> None:
    """Numbers that are none lie further behind than the next one has come: it must not even count them nothing."""
    planner, batch = generator.planner, generator.planner.batch(1)
    asked = plans(generator, 0)[1]
    alone = [plan.tokens for plan in planner.plan(*asked)]
    poisoned = next(planner.begin(["a"] * 4, 0, asked[2], planned=[alone[0]] * 3).segment())
    poisoned.text = (poisoned.text[0] * np.nan, poisoned.text[1])
    batch.join(poisoned)
    assert batch.step() == [poisoned] and isinstance(poisoned.error, FloatingPointError)
    (after,) = planned_in(batch, generator, [asked], [0])
    assert all(np.array_equal(a, b) for a, b in zip(alone, after, strict=True))


def test_what_the_transformer_makes_of_a_row_does_not_depend_on_the_batch() -> None:
    """Tokens hardly ever show a difference in the last bit: this looks at the bits, of a model as wide as `tiny`'s."""
    torch.manual_seed(0)
    model = ArTransformer(ArConfig(dim=192, layers=2, heads=4, block=(2, 4)), codebook_size=64, text_dim=8, max_text=6)
    model.requires_grad_(False).eval()

    def sampling(number: int) -> Sampling:
        text = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(number)), torch.ones(1, 6) > 0
        options = default_options(SamplingConfig(ar_guidance_scale=1.0 + number % 2))
        context = torch.zeros(number % 3, 4, 4, dtype=torch.long)
        return Sampling(text, context, (8, 4, 4), options, torch.Generator().manual_seed(number))

    def states(batch: SamplingBatch, followed: Sampling) -> list[torch.Tensor]:
        seen = []
        while not followed.ended:
            first = sum(member.rows for member in batch.members[: batch.members.index(followed)])
            seen.append(batch.decoder.state[first : first + followed.rows].clone())
            batch.step()
        return seen

    for number in range(4):
        alone, beside = SamplingBatch(model, 22), SamplingBatch(model, 22, 8)
        one, same = sampling(number), sampling(number)
        alone.join(one)
        for other in range(5):
            beside.join(sampling(10 + other) if other != 3 else same)
        pairs = zip(states(alone, one), states(beside, same), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_batch_has_room_for_so_many(generator: VideoGenerator) -> None:
    batch = DenoisingBatch(2)
    renderer: DiTRenderer = generator.renderer
    for each in renderings(generator, 0)[:2]:
        assert batch.has_room()
        batch.join(next(renderer.rendering(*each)))
    assert not batch.has_room()
    sizes = {most: generator.planner.batch(most).decoder.cache.values.shape[2] for most in (1, 2, 8)}
    assert sizes == {1: 2, 2: 4, 8: 16}
