"""AR, DiT and frame decoder as Ray Serve deployments, each with its own resources and autoscaling.

The classes hold no generation logic: they run `arlon_ray.generation` in threads of the replica, so that its event loop
stays free for cancellations and health checks.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from arlon_ray.bundle import Bundle
from arlon_ray.config import Config, DeploymentConfig
from arlon_ray.generation import ArPlanner, DiTRenderer, FrameDecoder, given_picture
from arlon_ray.generation.lanes import LANES
from arlon_ray.generation.options import segment_options
from arlon_ray.generation.rendering import DenoisingBatch
from arlon_ray.generation.video import encode_fragment
from arlon_ray.heap import keep_freed_memory
from arlon_ray.offload import Offload
from serve.batching import BatchWorker, Watch
from serve.loaded import LoadedModels
from serve.logs import LogSettings, log_stage, set_up_logging
from serve.metrics import Metrics, Stage
from serve.scaling import PAUSED, replicas_for_work
from serve.step_news import StepNews
from serve.tracing import worked
from serve.work import Decoded, Frame, Job, Latents, Permit, Timed, Tokens, Told

T = TypeVar("T")

_NICER = 15
_LATEST = 32  # steps whose batches are reported
_LEAST_LOOK_BACK_S = 10.5  # Ray's replicas report every 10 seconds
AR, DIT, DECODER = "ArPlanner", "DiTRenderer", "FrameDecoder"


class _Planner(BatchWorker):
    """The AR of one bundle, and its thread."""

    def __init__(self, threads: int, max_batch: int, stuck_s: float | None, bundle: Bundle) -> None:
        super().__init__(threads, stuck_s)
        self.now(_give_way, bundle.device)
        self.model = self.now(ArPlanner, bundle)
        self.use(self.model.batch(max_batch))


class _Renderer(BatchWorker):
    """The DiT of one bundle, and its thread."""

    def __init__(self, threads: int, max_batch: int, stuck_s: float | None, bundle: Bundle) -> None:
        super().__init__(threads, stuck_s)
        self.model = self.now(DiTRenderer, bundle)
        self.use(DenoisingBatch(max_batch))


class _Decoder:
    """The VAE of one bundle, and the threads that run it, in each of which torch and OpenCV compute with `threads`.

    On a CPU of several cores there are two: what the DiT renders together is decoded at the same time.
    """

    def __init__(self, threads: int, stuck_s: float | None, bundle: Bundle) -> None:
        import cv2

        def begin() -> None:
            torch.set_num_threads(threads)  # OpenMP's limit holds for the thread that sets it
            _give_way(bundle.device)

        keep_freed_memory()
        cv2.setNumThreads(threads)  # it would take all cores for the flow at borders
        calls = _lanes() if bundle.device.type == "cpu" else 1
        self._watch = Watch(stuck_s)
        self._pool = ThreadPoolExecutor(calls, initializer=begin)
        self.model = self._pool.submit(FrameDecoder, bundle).result()

    async def run(self, call: Callable[..., T], *arguments: Any) -> Timed[T]:
        """Run in one of the threads. If the caller is cancelled, a call that has not begun never does."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(self._run, call, *arguments))

    def _run(self, call: Callable[..., T], *arguments: Any) -> Timed[T]:
        with self._watch.at_work():
            return _timed(call, *arguments)

    def check(self) -> None:
        """Raises RuntimeError if a call does not end. A thread of a pool does not die."""
        self._watch.check()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)


class _Reports:
    """What a stage says of its work, in the log and to Prometheus."""

    def __init__(self, stage: Stage, log: LogSettings | None) -> None:
        if log is not None:
            set_up_logging(*log)
        self.stage, self.metrics = stage, Metrics()

    def segment(self, job: Job, index: int, made: Timed[Any], sizes: Sequence[int] = ()) -> None:
        """A segment is done; `sizes` are those of the batches that the latest steps ran."""
        log_stage(job.request_id, job.id, self.stage, index, made.seconds)
        worked(self.stage, job.id, index, made.started, made.seconds)
        if latest := list(sizes)[-_LATEST:]:
            self.metrics.batch(self.stage, sum(latest) / len(latest))


class ArDeployment:
    """Plans videos: streams one segment's tokens at a time. Requests share the AR's steps, at most `max_batch`.

    A cancelled one draws no more tokens.
    """

    def __init__(
        self,
        bundle: str,
        device: str,
        threads: int,
        max_batch: int,
        log: LogSettings | None = None,
        offload: Offload = "none",
        stuck_s: float | None = None,
    ) -> None:
        self._reports = _Reports("ar", log)
        self._models = LoadedModels(partial(_Planner, threads, max_batch, stuck_s), device, bundle, offload)
        self._paused = 0  # plans that wait until they may go on

    def record_autoscaling_stats(self) -> dict[str, int]:
        """What Serve asks for; see `serve.scaling`."""
        return {PAUSED: self._paused}

    async def _may_go_on(self, permit: Permit, index: int) -> int:
        self._paused += 1
        try:
            return await permit(index)
        finally:
            self._paused -= 1

    async def plan(
        self, job: Job, permit: Permit, planned: Sequence[Tokens] = (), given: Latents | None = None
    ) -> AsyncIterator[Timed[Tokens]]:
        """Tokens of the job's segments, in order, as far as `permit` lets it: asked where its last answer ends.

        `planned` are the tokens of the first segments, where those are there already: it goes on behind them.
        """
        async with self._models.of(job) as planner:
            plan = planner.model.begin(job.prompts, job.seed, job.options, given=_own(given), planned=planned)
            admitted = 0
            for index in range(len(planned), len(job.prompts)):
                if index >= admitted:
                    admitted = await self._may_go_on(permit, index)
                    if index >= admitted:
                        return
                made = await planner.run(plan.segment)
                self._reports.segment(job, index, made, planner.sizes)
                shared = planner.model.overlap_frames(index)
                self._reports.metrics.tokens(made.value.tokens[shared:].size)
                yield Timed(made.value.tokens, made.started, made.seconds)

    def check_health(self) -> None:
        """What Serve asks for. Raises RuntimeError if nothing can be planned any more, or a step does not end."""
        self._models.check()

    def statistics(self) -> dict[str, int]:
        """How many requests have shared a step of late, at most."""
        return {"largest_batch": _largest(self._models)}


class DitDeployment:
    """Renders segments. They share the DiT's steps, at most `max_batch`.

    A cancelled one leaves before its next denoising step.
    """

    def __init__(
        self,
        bundle: str,
        device: str,
        threads: int,
        max_batch: int,
        log: LogSettings | None = None,
        offload: Offload = "none",
        stuck_s: float | None = None,
    ) -> None:
        self._reports = _Reports("dit", log)
        # lanes are worth a thread each, also where a replica has asked for one core or a share of it
        threads = max(threads, _lanes())
        self._models = LoadedModels(partial(_Renderer, threads, max_batch, stuck_s), device, bundle, offload)
        self._counts = {"steps": 0, "segments": 0}
        self._news = StepNews()

    async def render(
        self,
        job: Job,
        index: int,
        tokens: Tokens | None,
        overlap: Latents | None,
        told: Told | None = None,
    ) -> Timed[Latents]:
        """The new latents [C, n, h, w] of segment `index`. `told(index, step)` hears of steps; see `StepNews`."""
        loop = asyncio.get_running_loop()

        def on_step(step: int) -> None:
            self._counts["steps"] += 1
            if told is not None:
                loop.call_soon_threadsafe(self._news.note, told, index, step + 1)

        options = segment_options(job.options, job.prompts, index)
        async with self._models.of(job) as renderer:
            try:
                rendered = await renderer.run(
                    lambda: renderer.model.rendering(
                        job.prompts[index], _own(tokens), _own(overlap), job.seed, index, options, on_step
                    )
                )
            finally:
                if told is not None:
                    self._news.forget(told)
            self._counts["segments"] += 1
            self._reports.segment(job, index, rendered, renderer.sizes)
        return Timed(rendered.value.latents, rendered.started, rendered.seconds)

    def check_health(self) -> None:
        """What Serve asks for. Raises RuntimeError if nothing can be rendered any more, or a step does not end."""
        self._models.check()

    def statistics(self) -> dict[str, int]:
        """Evaluations begun and segments rendered since this replica started; most that shared a step of late."""
        return {**self._counts, "largest_batch": _largest(self._models)}


class DecoderDeployment:
    """Latents to an mp4 fragment."""

    def __init__(
        self,
        bundle: str,
        device: str,
        threads: int,
        fps: float,
        log: LogSettings | None = None,
        offload: Offload = "none",
        stuck_s: float | None = None,
    ) -> None:
        self._reports = _Reports("decode", log)
        self._models = LoadedModels(partial(_Decoder, threads, stuck_s), device, bundle, offload)
        self._fps = fps

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        """A fragment for `join_fragments` out of latents [C, n, h, w]."""
        return await self._decoded(job, index, FrameDecoder.decode, latents, before)

    async def preview(self, job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
        """The same out of the tokens [n, h', w'] of whole groups alone."""
        return await self._decoded(job, index, FrameDecoder.preview, tokens, before)

    async def _decoded(
        self, job: Job, index: int, call: Callable[..., Any], what: Latents | Tokens, before: Frame | None
    ) -> Timed[Decoded]:
        def decode(decoder: FrameDecoder) -> Decoded:
            frames = call(decoder, _own(what), before, job.options.seam_frames)
            return Decoded(encode_fragment(frames, self._fps), frames[-1].copy())

        async with self._models.of(job) as decoder:
            decoded = await decoder.run(decode, decoder.model)
        self._reports.segment(job, index, decoded)
        return decoded

    async def encode(self, job: Job, picture: Frame) -> Timed[Latents]:
        """The latents [C, 1, h, w] of a picture uint8 [H, W, 3]."""
        async with self._models.of(job) as decoder:
            return await decoder.run(lambda: given_picture(decoder.model.bundle, _own(picture)).latents)

    def check_health(self) -> None:
        """What Serve asks for. Raises RuntimeError if a call does not end."""
        self._models.check()


def bind_stages(config: Config, bundle: str) -> tuple[serve.Application | None, serve.Application, serve.Application]:
    """AR, DiT and decoder of `bundle`, ready to be bound to the API. No AR where every video is a baseline."""

    def bound(kind: type, name: str, settings: DeploymentConfig, *arguments: Any) -> serve.Application:
        deployment = serve.deployment(
            name=name,
            # a plan is one call for as long as its video is made: none may keep another one's place
            max_ongoing_requests=max(
                settings.max_ongoing_requests, config.serve.most_running if kind is ArDeployment else 1
            ),
            autoscaling_config=AutoscalingConfig(
                min_replicas=settings.min_replicas,
                max_replicas=settings.max_replicas,
                target_ongoing_requests=settings.target_ongoing_requests,
                upscale_delay_s=settings.upscale_delay_s,
                downscale_delay_s=settings.downscale_delay_s,
                look_back_period_s=max(_LEAST_LOOK_BACK_S, settings.upscale_delay_s),
                policy=AutoscalingPolicy(policy_function=replicas_for_work),
            ),
            ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
            graceful_shutdown_timeout_s=5,
        )(kind)
        device = "cuda" if settings.num_gpus else "cpu"
        threads, offload = max(1, int(settings.num_cpus)), settings.offload
        return deployment.bind(bundle, device, threads, *arguments, log, offload, config.serve.stuck_s)

    log: LogSettings = (config.serve.log_format, config.serve.log_level)
    return (
        None if config.sampling.baseline else bound(ArDeployment, AR, config.serve.ar, config.serve.ar.max_batch),
        bound(DitDeployment, DIT, config.serve.dit, config.serve.dit.max_batch),
        bound(DecoderDeployment, DECODER, config.serve.decoder, config.video.fps),
    )


def _give_way(device: torch.device) -> None:
    """This thread, and those that it will start, leave a processor of `device` to the DiT where both want it.

    A video's segments wait for the DiT alone: AR and decoder have time until its next one is there. Event loops keep
    their place.
    """
    if device.type != "cpu" or sys.platform != "linux":  # elsewhere a thread has no niceness of its own
        return
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)


def _lanes() -> int:
    return min(LANES, len(os.sched_getaffinity(0)))


def _largest(models: Iterable[BatchWorker]) -> int:
    return max((size for model in models for size in model.sizes), default=0)


def _timed(call: Callable[..., T], *arguments: Any) -> Timed[T]:
    started, clock = time.time(), time.perf_counter()
    value = call(*arguments)
    return Timed(value, started, time.perf_counter() - clock)


def _own(array: Any) -> Any:
    """A copy that may be written to: arrays that come through Ray may not, which torch complains about."""
    return None if array is None else np.array(array)
