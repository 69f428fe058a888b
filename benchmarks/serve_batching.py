"""Requests at the same time against one after the other, through the AR's, the DiT's and the decoder's deployments.

`python -m benchmarks.serve_batching --bundle weights/tiny --output benchmarks/results/serve_batching.json`

Each deployment is a process of its own with one thread of torch, as Serve starts them; what Ray adds on top is left
out. The same requests (2 to 4 segments each) are made in turns: one after the other, and all at once, where replicas
take up to `--max-batch` of them into a step. In both ways the stages of a video overlap as they do in the service.
`alone` repeats "all at once" with a batch of one, which tells what comes of batching from what comes of busy cores.
Every video's latents must be the same in all ways, to the last bit.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.bundle import load_bundle
from arlon_ray.generation import HandOver, default_options
from benchmarks.machine import machine
from jobs.command_line import BOX, existing, parser, run
from serve.work import Job

PROMPTS = ("A red circle moves to the right.", "A large blue square falls.", "A green triangle rests.")
SEGMENTS = (2, 3, 4, 3)


def replica(pipe: Connection, stage: str, bundle: str, threads: int, max_batch: int, fps: float) -> None:
    """A process that serves one deployment: answers (number, method, arguments) with (number, item or error, last?)."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    asyncio.run(_serve(pipe, stage, bundle, threads, max_batch, fps))


async def _serve(pipe: Connection, stage: str, bundle: str, threads: int, max_batch: int, fps: float) -> None:
    from serve.deployments import ArDeployment, DecoderDeployment, DitDeployment

    made: Any = (
        ArDeployment(bundle, "cpu", threads, max_batch) if stage == "ar"
        else DitDeployment(bundle, "cpu", threads, max_batch) if stage == "dit"
        else DecoderDeployment(bundle, "cpu", threads, fps)
    )  # fmt: skip
    pipe.send((-1, None, True))

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            if method == "plan":
                async for planned in made.plan(*arguments, _always):
                    pipe.send((number, planned, False))
                pipe.send((number, None, True))
            elif method == "cpu":
                pipe.send((number, time.process_time(), True))
            else:
                pipe.send((number, await getattr(made, method)(*arguments), True))
        except Exception as error:
            pipe.send((number, error, True))

    tasks = set()
    while (asked := await asyncio.to_thread(pipe.recv)) is not None:
        tasks.add(task := asyncio.create_task(answer(*asked)))
        task.add_done_callback(tasks.discard)


async def _always(index: int) -> bool:
    return True


class Stage:
    """One deployment in a process of its own, seen from here."""

    def __init__(self, stage: str, bundle: str, threads: int, max_batch: int, fps: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=replica, args=(theirs, stage, bundle, threads, max_batch, fps), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()
        self._numbers, self._waiting = itertools.count(), dict[int, asyncio.Queue[tuple[Any, bool]]]()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.busy = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                number, item, last = self._pipe.recv()
            except EOFError:
                return
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._waiting[number].put_nowait, (item, last))

    async def stream(self, method: str, *arguments: Any) -> AsyncIterator[Any]:
        """What the method yields."""
        self._loop, number = asyncio.get_running_loop(), next(self._numbers)
        answers = self._waiting[number] = asyncio.Queue()
        self._pipe.send((number, method, arguments))
        while True:
            item, last = await answers.get()
            if isinstance(item, Exception):
                raise item
            if not (last and method == "plan"):
                yield item
            if last:
                return

    async def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns."""
        self.busy += 1
        try:
            return await anext(self.stream(method, *arguments))
        finally:
            self.busy -= 1

    def close(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


class Service:
    """The three stages, and a video made of them as `serve.orchestrator` does."""

    def __init__(self, bundle: Path, threads: int, max_batch: int, dits: int) -> None:
        self.config = load_bundle(bundle).config
        fps = self.config.video.fps
        self.ar, self.decoder, *self.dits = (
            Stage(stage, str(bundle), threads, max_batch, fps) for stage in ("ar", "decoder", *["dit"] * dits)
        )

    async def video(self, job: Job) -> str:
        """Make one; returns the hash of its latents."""
        planned: asyncio.Queue[Any] = asyncio.Queue()

        async def plan() -> None:
            async for tokens in self.ar.stream("plan", job):
                planned.put_nowait(tokens.value)

        digest, handed, decoding = hashlib.sha256(), None, None
        async with asyncio.TaskGroup() as group:
            group.create_task(plan())
            for index in range(len(job.prompts)):
                dit = min(self.dits, key=lambda stage: stage.busy)
                latents = (await dit.call("render", job, index, await planned.get(), handed)).value
                digest.update(latents.tobytes())
                handed = HandOver.of(self.config, job.prompts).after(handed, latents, index)
                before: Any = (await decoding).value.last if decoding else None
                decoding = group.create_task(self.decoder.call("decode", job, index, latents, before))
        return digest.hexdigest()

    async def all_at_once(self, jobs: list[Job]) -> list[str]:
        """Every video at the same time."""
        return list(await asyncio.gather(*(self.video(job) for job in jobs)))

    async def one_by_one(self, jobs: list[Job]) -> list[str]:
        """Every video after the one before."""
        return [await self.video(job) for job in jobs]

    async def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each stage so far."""
        stages = {"ar": [self.ar], "dit": self.dits, "decoder": [self.decoder]}
        return {name: sum([await each.call("cpu") for each in of_name]) for name, of_name in stages.items()}

    def close(self) -> None:
        """End the processes."""
        for stage in (self.ar, self.decoder, *self.dits):
            stage.close()


async def measure(services: dict[str, Service], jobs: list[Job], runs: int) -> dict[str, Any]:
    """Seconds of all jobs in each way, in turns."""
    batched, alone = services["batched"], services["alone"]
    ways = {"one_by_one": (batched, "one_by_one"), "at_once": (batched, "all_at_once"), "alone": (alone, "all_at_once")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    hashes: dict[str, list[str]] = {}
    for service in services.values():
        await service.all_at_once(jobs)  # warm up
    for _ in range(runs):
        for way, (service, how) in ways.items():
            before, begin = await service.cpu_s(), time.perf_counter()
            made = await getattr(service, how)(jobs)
            seconds[way].append(time.perf_counter() - begin)
            after = await service.cpu_s()
            cpu[way].append({stage: after[stage] - before[stage] for stage in after})
            if hashes.setdefault("videos", made) != made:
                raise RuntimeError(f"{way}: other latents than before")
    return {
        "seconds": {way: {"median": statistics.median(s), "min": min(s), "max": max(s)} for way, s in seconds.items()},
        "cpu_s": {
            way: {stage: statistics.median(run[stage] for run in of_way) for stage in of_way[0]}
            for way, of_way in cpu.items()
        },
        # of each run by itself: what else the machine does changes from minute to minute
        "faster": statistics.median(np.divide(seconds["one_by_one"], seconds["at_once"]).tolist()),
        "faster_without_batching": statistics.median(np.divide(seconds["one_by_one"], seconds["alone"]).tolist()),
        "identical": True,
    }


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="serve_batching.json", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR")
    flags.add_argument("--requests", type=int, default=8, metavar="N")
    flags.add_argument("--runs", type=int, default=5, metavar="N")
    flags.add_argument("--max-batch", type=int, default=8, metavar="N")
    flags.add_argument("--dits", type=int, default=1, metavar="N", help="replicas of the DiT")
    flags.add_argument("--threads", type=int, default=1, metavar="N", help="of torch, in each replica")
    arguments = flags.parse_args()
    bundle, described = existing(arguments.bundle, "--bundle"), machine()
    sampling = load_bundle(bundle).config.sampling
    jobs = [
        Job(str(n), (PROMPTS[n % 3],) * SEGMENTS[n % 4], n, default_options(sampling))
        for n in range(arguments.requests)
    ]
    services = {
        name: Service(bundle, arguments.threads, most, arguments.dits)
        for name, most in (("batched", arguments.max_batch), ("alone", 1))
    }
    try:
        result = asyncio.run(measure(services, jobs, arguments.runs))
    finally:
        for service in services.values():
            service.close()
    settings = {name: getattr(arguments, name) for name in ("requests", "runs", "max_batch", "dits", "threads")}
    segments = sum(len(job.prompts) for job in jobs)
    whole = {"machine": described, "bundle": bundle.name, **settings, "segments": segments, **result}
    Path(arguments.output).write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run(main)
