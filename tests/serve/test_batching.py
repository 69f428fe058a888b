"""The AR's and the DiT's deployments as plain classes: many callers, one batch; no Ray."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from arlon_ray.bundle import load_bundle
from arlon_ray.generation import DiTRenderer, FrameDecoder, VideoGenerator, default_options, segment_options
from arlon_ray.generation.rendering import Denoising, DenoisingBatch
from serve.batching import BatchWorker, Cancelled
from serve.deployments import ArDeployment, DecoderDeployment, DitDeployment
from serve.work import Job, Timed, Tokens
from tests.bundles import make_random_bundle
from tests.serve.play import driven
from tests.test_offload import aligned


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the replicas have: the last bits may depend on the number of threads, in this project as in any."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def generator(bundle: Path) -> VideoGenerator:
    return VideoGenerator.from_bundle(bundle)


@pytest.fixture(scope="module")
def ar(bundle: Path) -> Iterator[ArDeployment]:
    yield ArDeployment(str(bundle), "cpu", 1, 3)


@pytest.fixture(scope="module")
def dit(bundle: Path) -> Iterator[DitDeployment]:
    yield DitDeployment(str(bundle), "cpu", 1, 3)


def job(generator: VideoGenerator, number: int, segments: int = 2, **changes: object) -> Job:
    options = default_options(generator.bundle.config.sampling, **changes)
    return Job(f"video_{number}", ("a red circle" + " moves" * number,) * segments, number, options)


async def always(index: int) -> int:
    return 1000


async def plan(ar: ArDeployment, asked: Job, permit: Callable[[int], Awaitable[int]] = always) -> list[Tokens]:
    return [made.value async for made in ar.plan(asked, permit)]


@driven
async def test_plans_of_many_are_those_of_each(ar: ArDeployment, generator: VideoGenerator) -> None:
    jobs = [job(generator, number, 1 + number % 3, ar_guidance_scale=1.0 + number % 2) for number in range(7)]
    expected = [[p.tokens for p in generator.planner.plan(j.prompts, j.seed, j.options)] for j in jobs]
    made = await asyncio.gather(*(plan(ar, each) for each in jobs))
    for ours, theirs in zip(made, expected, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert 2 <= ar.statistics()["largest_batch"] <= 3
    asked: list[int] = []

    async def permit(index: int) -> int:
        asked.append(index)
        return min(index + 2, 5)

    whole = [p.tokens for p in generator.planner.plan(("a",) * 6, 9, jobs[0].options)]
    resumed = Job("video_r", ("a",) * 6, 9, jobs[0].options)
    rest = [made async for made in ar.plan(resumed, permit, whole[:2])]
    assert asked == [2, 4, 5] and len(rest) == 3  # once for two segments
    assert all(np.array_equal(made.value, tokens) for made, tokens in zip(rest, whole[2:], strict=False))
    assert isinstance(rest[0], Timed) and rest[0].seconds > 0


@driven
async def test_segments_of_many_are_those_of_each(dit: DitDeployment, generator: VideoGenerator) -> None:
    tokens = np.random.default_rng(0).integers(0, 32, (8, 10, 4, 4)).astype(np.int32)
    overlap = np.random.default_rng(1).normal(size=(8, 5, 8, 8)).astype(np.float32)
    solvers = ("euler", "ab2", "heun", "dpm2m", "midpoint", "euler")
    jobs = [
        job(generator, n, 2, steps=1 + n, baseline=n == 3, solver=solvers[n], guidance_low=n / 10, cache_layers=n % 2)
        for n in range(6)
    ]
    told: list[tuple[int, int]] = []

    async def listen(index: int, step: int) -> None:
        told.append((index, step))
        raise ConnectionError("nobody is disturbed by that")

    arguments = [(j, 1, None if j.options.baseline else tokens[n], overlap) for n, j in enumerate(jobs)]
    before = dit.statistics()
    made = await asyncio.gather(
        *(dit.render(*each, listen if number == 4 else None) for number, each in enumerate(arguments))
    )
    for (each, index, plan_of_it, taken), ours in zip(arguments, made, strict=True):
        its = segment_options(each.options, each.prompts, index)
        alone = generator.renderer.render(each.prompts[1], plan_of_it, taken, each.seed, index, its)
        assert np.array_equal(ours.value, alone.latents)
    after = dit.statistics()
    assert after["steps"] - before["steps"] == 1 + 2 + 5 + 4 + 10 + 6 and after["segments"] - before["segments"] == 6
    # the first is told at once, later ones if there is time
    assert after["largest_batch"] == 3 and told[0] == (1, 1) and told == sorted(set(told)) and told[-1] <= (1, 10)


@driven
async def test_one_that_is_cancelled_leaves_before_its_next_step(dit: DitDeployment, generator: VideoGenerator) -> None:
    tokens = np.zeros((10, 4, 4), np.int32)
    begun, steps = asyncio.Event(), []

    async def listen(_: int, step: int) -> None:
        steps.append(step)
        begun.set()

    long = asyncio.ensure_future(dit.render(job(generator, 1, steps=5000), 0, tokens, None, listen))
    waits = [asyncio.ensure_future(dit.render(job(generator, n, steps=30), 0, tokens, None)) for n in (2, 3, 4)]
    await begun.wait()
    long.cancel()
    waits[2].cancel()  # has not begun: the batch is full
    with pytest.raises(asyncio.CancelledError):
        await long
    made = [(await each).value for each in waits[:2]]
    seen, counted = len(steps), dit.statistics()["steps"]
    await asyncio.sleep(0.1)
    assert len(steps) == seen < 5000 and dit.statistics()["steps"] == counted
    for number, latents in zip((2, 3), made, strict=True):
        each = job(generator, number, steps=30)
        alone = generator.renderer.render(each.prompts[0], tokens, None, each.seed, 0, each.options)
        assert np.array_equal(latents, alone.latents)


@driven
async def test_no_step_begins_behind_a_cancellation(
    dit: DitDeployment, generator: VideoGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, let, real = np.zeros((10, 4, 4), np.int32), threading.Semaphore(0), DenoisingBatch.step

    def step(batch: DenoisingBatch) -> list[Denoising]:
        let.acquire()
        return real(batch)

    monkeypatch.setattr(DenoisingBatch, "step", step)
    for steps in (1, 2, 7):
        before = dit.statistics()["steps"]
        long = asyncio.ensure_future(dit.render(job(generator, 1, steps=50), 0, tokens, None))
        for _ in range(steps):
            let.release()
        while dit.statistics()["steps"] < before + steps:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)  # the next one is at work: it waits for `let`
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        for _ in range(5):
            let.release()
        await asyncio.sleep(0.05)
        assert dit.statistics()["steps"] == before + steps + 1
        while let.acquire(blocking=False):  # nobody waits for more than the first
            pass


@driven
async def test_a_plan_that_nobody_reads_any_more_leaves(ar: ArDeployment, generator: VideoGenerator) -> None:
    async def read_one(stream: AsyncIterator[Timed[Tokens]]) -> Tokens:
        async with aclosing(stream):  # type: ignore[type-var]
            return (await anext(stream)).value

    first = asyncio.ensure_future(plan(ar, job(generator, 1, 60)))
    other = asyncio.ensure_future(plan(ar, job(generator, 2, 2)))
    assert np.array_equal(
        await read_one(ar.plan(job(generator, 3), always)),
        next(generator.planner.plan(job(generator, 3).prompts, 3, job(generator, 3).options)).tokens,
    )
    first.cancel()
    expected = generator.planner.plan(job(generator, 2).prompts, 2, job(generator, 2).options)
    for ours, theirs in zip(await other, expected, strict=True):
        assert np.array_equal(ours, theirs.tokens)
    with pytest.raises(asyncio.CancelledError):
        await first
    await asyncio.sleep(0.1)
    (worker,) = ar._models
    assert not worker._active and not worker._line


@driven
async def test_one_that_fails_fails_alone(dit: DitDeployment, ar: ArDeployment, generator: VideoGenerator) -> None:
    fine, tokens = job(generator, 1), np.zeros((10, 4, 4), np.int32)
    nan = np.full((8, 5, 8, 8), np.nan, np.float32)
    results = await asyncio.gather(
        dit.render(fine, 0, tokens, None),
        dit.render(fine, 0, tokens[:5], None),
        dit.render(fine, 1, tokens, nan),
        dit.render(fine, 0, None, None),
        plan(ar, fine),
        ar.plan(fine, always, given=np.zeros((3, 5, 8, 8), np.float32)).__anext__(),
        return_exceptions=True,
    )
    kinds = [type(result) for result in results]
    assert kinds[:5] == [Timed, ValueError, FloatingPointError, ValueError, list] and issubclass(kinds[5], Exception)
    alone = generator.renderer.render(fine.prompts[0], tokens, None, fine.seed, 0, fine.options)
    assert np.array_equal(results[0].value, alone.latents)  # type: ignore[union-attr]
    dit.check_health(), ar.check_health()


@driven
async def test_an_error_of_the_step_itself_ends_all_and_the_next_goes_on(bundle: Path) -> None:
    """What is nobody's own: memory that is short, for one."""
    replica = DitDeployment(str(bundle), "cpu", 1, 2)
    (renderer,) = (each.model for each in replica._models)
    options = default_options(renderer.config.sampling, steps=3)
    asked, tokens = Job("v", ("a",), 0, options), np.zeros((10, 4, 4), np.int32)
    model = renderer.dit
    denoise, calls = model.denoise, []

    def short_of_memory(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        return denoise(*arguments)  # type: ignore[arg-type]

    model.denoise = short_of_memory  # type: ignore[method-assign, assignment]
    both = await asyncio.gather(*(replica.render(asked, 0, tokens, None) for _ in range(2)), return_exceptions=True)
    assert [type(each) for each in both] == [MemoryError] * 2
    again = await replica.render(asked, 0, tokens, None)
    alone = DiTRenderer(renderer.bundle).render("a", tokens, None, 0, 0, options)
    assert np.array_equal(again.value, alone.latents)


@driven
async def test_parts_that_are_offloaded_make_the_same(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    tokens, latents = rng.integers(0, 32, (3, 10, 4, 4)).astype(np.int32), rng.normal(size=(8, 5, 8, 8))
    generator = VideoGenerator(aligned(load_bundle(bundle)))
    jobs = [job(generator, number, 1, steps=2 + number) for number in range(3)]
    plans = [next(generator.planner.plan(each.prompts, each.seed, each.options)).tokens for each in jobs]
    alone = [generator.renderer.render(j.prompts[0], tokens[n], None, j.seed, 0, j.options) for n, j in enumerate(jobs)]
    frames = generator.decoder.decode(latents.astype(np.float32), None, 0)
    for offload in ("idle", "all"):
        ar, dit = (kind(str(bundle), "cpu", 1, 2, offload=offload) for kind in (ArDeployment, DitDeployment))
        decoder = DecoderDeployment(str(bundle), "cpu", 1, 16.0, offload=offload)
        held = [each.model for replica in (ar, dit, decoder) for each in replica._models]  # type: ignore[attr-defined]
        assert [model.bundle.offload for model in held] == [offload] * 3
        planned = await asyncio.gather(*(plan(ar, each) for each in jobs))
        assert all(np.array_equal(ours, theirs) for (ours,), theirs in zip(planned, plans, strict=True))
        made = await asyncio.gather(*(dit.render(each, 0, tokens[n], None) for n, each in enumerate(jobs)))
        assert all(np.array_equal(a.value, b.latents) for a, b in zip(made, alone, strict=True))
        decoded = await decoder.decode(jobs[0], 0, latents.astype(np.float32), None)
        assert np.array_equal(decoded.value.last, frames[-1])
        # nothing is left at work
        parts = [part for model in held for part in model.bundle.turns._parts.values()]
        assert parts and not any(part.users for part in parts)


@driven
async def test_segments_of_several_videos_are_decoded_at_the_same_time(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: one segment at a time")
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(8, 5, 8, 8)).astype(np.float32) for _ in range(4)]
    before = rng.integers(0, 255, (64, 64, 3), np.uint8)
    generator = VideoGenerator(load_bundle(bundle))
    alone = [generator.decoder.decode(latents, before, 12)[-1] for latents in given]
    decoder, asked = DecoderDeployment(str(bundle), "cpu", 1, 16.0), job(generator, 0, 1)
    both, decode = threading.Barrier(2), FrameDecoder.decode

    def meeting(*arguments: Any) -> np.ndarray:
        both.wait(timeout=30)  # a second one is at work
        return decode(*arguments)

    monkeypatch.setattr(FrameDecoder, "decode", meeting)
    decoded = await asyncio.gather(*(decoder.decode(asked, 0, latents, before) for latents in given))
    assert all(np.array_equal(each.value.last, last) for each, last in zip(decoded, alone, strict=True))


def test_a_decoder_takes_no_more_threads_than_it_was_given(bundle: Path) -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(3)
        DecoderDeployment(str(bundle), "cpu", 1, 16.0)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


@driven
async def test_work_that_does_not_end_is_noticed(
    bundle: Path, generator: VideoGenerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a device that hangs: Serve replaces a replica that is not healthy."""
    go_on, tokens = threading.Event(), np.zeros((10, 4, 4), np.int32)

    def blocked(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            assert go_on.wait(20)
            return real(*arguments)

        return call

    dit = DitDeployment(str(bundle), "cpu", 1, 3, stuck_s=0.5)
    decoder = DecoderDeployment(str(bundle), "cpu", 1, 16.0, stuck_s=0.5)
    patient = DitDeployment(str(bundle), "cpu", 1, 3, stuck_s=None)
    await dit.render(job(generator, 1), 0, tokens, None)  # many steps, each of them short
    monkeypatch.setattr(DenoisingBatch, "step", blocked(DenoisingBatch.step))
    monkeypatch.setattr(FrameDecoder, "decode", blocked(FrameDecoder.decode))
    latents = np.zeros((8, 10, 8, 8), np.float32)
    calls = [asyncio.ensure_future(each.render(job(generator, 1), 0, tokens, None)) for each in (dit, patient)]
    calls.append(asyncio.ensure_future(decoder.decode(job(generator, 1), 0, latents, None)))  # type: ignore[arg-type]
    for each in (dit, decoder):
        each.check_health()
    await asyncio.sleep(1.0)
    for each in (dit, decoder):
        with pytest.raises(RuntimeError, match=r"has not ended for 1 s \(serve\.stuck_s=0\.5\)"):
            each.check_health()
        assert "assert go_on.wait(20)" in caplog.text  # where it is
        caplog.clear()
    patient.check_health()
    go_on.set()
    await asyncio.gather(*calls)
    for each in (dit, decoder):
        each.check_health()


@driven
async def test_errors_of_the_thread_reach_the_caller() -> None:
    worker: BatchWorker = BatchWorker(1)
    with pytest.raises(ZeroDivisionError):
        worker.now(lambda: 1 // 0)
    assert worker.now(lambda: 3) == 3
    worker.check()
    assert issubclass(Cancelled, RuntimeError)
