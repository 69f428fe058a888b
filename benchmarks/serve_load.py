"""The service under many clients, what a served video costs over one that is made in this process, and what is gained
where requests come at the same time.

`python -m benchmarks.serve_load --clients 50 --seconds 180 --output benchmarks/results/serve_load.json`

Each client asks for a video, follows its events to the end, downloads it, and asks for the next one; refused with 429
it waits as long as it was told. What a client sees must be true: a status never goes back, a video that was accepted
ends, and its file has as many frames as it says.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from arlon_ray.bundle import load_bundle
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.generation.video import encode_fragment, join_fragments, read_video
from benchmarks.machine import machine
from jobs.command_line import BOX, InputError, existing, parser, run
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.app import serve_bundle
from serve.settings import served_config

PROMPTS = [
    f"A {colour} {shape} moves to the {side}."
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for side in ("left", "right")
]
PARTS = ("overhead", "together", "load")
_ORDER = {"queued": 0, "in_progress": 1, "completed": 2, "failed": 2}


class Seen:
    """What the clients have seen."""

    def __init__(self) -> None:
        self.latency_s: list[float] = []
        self.first_segment_s: list[float] = []
        self.refused = self.segments = 0
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []

    def later(self, furthest: str, status: str) -> str:
        """How far a video has come that had come to `furthest` and now says `status`: it must not go back."""
        if status != furthest and _ORDER[status] <= _ORDER[furthest]:
            self.wrong.append(f"{status} behind {furthest}")
            return furthest
        return status


async def client(http: httpx.AsyncClient, number: int, segments: int, end: float, seen: Seen) -> None:
    """One client, until `end` (monotonic seconds)."""
    chance = random.Random(number)
    while time.monotonic() < end:
        body = {"prompt": chance.choice(PROMPTS), "num_segments": segments, "seed": chance.randrange(2**31)}
        asked = time.monotonic()
        answer = await http.post("/v1/videos", json=body)
        if answer.status_code == 429:
            seen.refused += 1
            await asyncio.sleep(min(float(answer.headers["retry-after"]), max(0.0, end - time.monotonic())))
            continue
        if answer.status_code != 200:
            seen.wrong.append(f"{answer.status_code}: {answer.text[:100]}")
            return
        await follow(http, answer.json(), asked, seen)


async def follow(http: httpx.AsyncClient, video: dict[str, Any], asked: float, seen: Seen) -> None:
    """Watch a video to its end, and look at the file."""
    path, first, furthest = f"/v1/videos/{video['id']}", None, video["status"]

    async def look() -> dict[str, Any]:
        nonlocal furthest
        now: dict[str, Any] = (await http.get(path)).json()
        furthest = seen.later(furthest, now["status"])
        return now

    async with http.stream("GET", f"{path}/events") as events:
        async for line in events.aiter_lines():
            event = line.removeprefix("event: ")
            if event in _ORDER:
                furthest = seen.later(furthest, event)
            elif event == "segment.completed":
                if first is None:
                    first = time.monotonic()
                    seen.first_segment_s.append(first - asked)
                furthest = max(furthest, "in_progress", key=_ORDER.__getitem__)
                await look()
    ended = await look()
    seen.latency_s.append(time.monotonic() - asked)
    seen.statuses[ended["status"]] += 1
    if ended["status"] != "completed":
        seen.wrong.append(f"{ended['status']}: {ended['error']}")
        return
    content = (await http.get(f"{path}/content")).content
    frames, promised = len(read_video(io.BytesIO(content))), sum(part["frames"] for part in ended["segments"])
    if frames != promised:
        seen.wrong.append(f"{frames} frames instead of {promised}")
    seen.segments += len(ended["segments"])


async def load(url: str, clients: int, seconds: float, segments: int) -> dict[str, Any]:
    """All clients at the same time; what they saw."""
    seen, began = Seen(), time.monotonic()
    limits = httpx.Limits(max_connections=3 * clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        before = await listed(http)
        work = (client(http, number, segments, began + seconds, seen) for number in range(clients))
        await asyncio.gather(*work)
        health = (await http.get("/healthz")).json()
        accepted = await listed(http) - before
    took = time.monotonic() - began
    return {
        "clients": clients,
        "seconds": round(took, 1),
        "videos": dict(seen.statuses),
        "lost": accepted - sum(seen.statuses.values()),
        "left": health["queued"] + health["running"],
        "wrong": seen.wrong,
        "refused_429": seen.refused,
        "segments_per_s": round(seen.segments / took, 2),
        "latency_s": percentiles(seen.latency_s),
        "first_segment_s": percentiles(seen.first_segment_s),
    }


async def listed(http: httpx.AsyncClient) -> int:
    """How many videos the service knows."""
    count = 0
    after: dict[str, str] = {}
    while True:
        page = (await http.get("/v1/videos", params={"limit": 100, **after})).json()
        count, after = count + len(page["data"]), {"after": page["last_id"]}
        if not page["has_more"]:
            return count


async def together(url: str, requests: int, segments: int, runs: int) -> dict[str, Any]:
    """Seconds of some requests one after another and at the same time, in turns, and what processes did meanwhile."""
    seconds: dict[str, list[float]] = {"one_by_one": [], "at_once": []}
    cpu: dict[str, list[Counter[str]]] = {"one_by_one": [], "at_once": []}

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def one(number: int) -> None:
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "num_segments": segments, "seed": number}
            made = (await http.post("/v1/videos", json=body)).json()["id"]
            async with http.stream("GET", f"/v1/videos/{made}/stream") as video:
                async for _ in video.aiter_raw():
                    pass

        async def one_by_one() -> None:
            for number in range(requests):
                await one(number)

        async def at_once() -> None:
            await asyncio.gather(*(one(number) for number in range(requests)))

        for turn in range(runs + 1):
            for way, work in (("one_by_one", one_by_one), ("at_once", at_once)):
                before, begin = cpu_s(), time.perf_counter()
                await work()
                took, after = time.perf_counter() - begin, cpu_s()
                if turn:  # the first of each warms up
                    seconds[way].append(took)
                    cpu[way].append(after - before)
    ratios = [a / b for a, b in zip(seconds["one_by_one"], seconds["at_once"], strict=True)]
    return {
        "requests": requests,
        "segments": segments,
        **seconds,
        "faster": statistics.median(ratios),
        "cpu_s": {
            way: {name: round(statistics.median(run[name] for run in its), 2) for name in sorted(set().union(*its))}
            for way, its in cpu.items()
        },
    }


def cpu_s() -> Counter[str]:
    """CPU seconds so far of this process and of all that Ray has started here, by what they are."""
    own = psutil.Process()
    found: Counter[str] = Counter({"client": sum(own.cpu_times()[:2])})
    for each in own.children(recursive=True):
        with suppress(psutil.Error):
            # actors call themselves ray::CLASS.METHOD, replicas ray::ServeReplica:APP:DEPLOYMENT.METHOD
            actor = re.match(r"ray::(?:ServeReplica:\w+:)?(\w+)", " ".join(each.cmdline()))
            found[actor[1] if actor else each.name()] += sum(each.cpu_times()[:2])
    return found


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the longest."""
    if not values:
        return {}
    found = {f"p{share}": round(float(np.percentile(values, share)), 2) for share in (50, 90, 99)}
    return {**found, "max": round(max(values), 2)}


@contextmanager
def no_service() -> Iterator[None]:
    """Within the block nothing runs that Ray has started here: an idle service takes a part of a core, too."""
    stopped = psutil.Process().children(recursive=True)
    try:
        for each in stopped:
            with suppress(psutil.Error):
                each.suspend()
        yield
    finally:
        for each in stopped:
            with suppress(psutil.Error):
                each.resume()


def made_here(generator: VideoGenerator, segments: int, seed: int) -> float:
    """Seconds of one video, made in this process while there is no service."""
    options, fps = default_options(generator.bundle.config.sampling), generator.bundle.config.video.fps
    with no_service(), tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        parts = generator.generate([PROMPTS[seed % len(PROMPTS)]] * segments, seed, options)
        join_fragments([encode_fragment(frames, fps) for frames in parts], Path(folder) / "video.mp4")
        return time.perf_counter() - begin


def alone(generator: VideoGenerator, segments: int, videos: int = 20) -> float:
    """Segments a second of one process that makes the clients' videos one after another."""
    made_here(generator, segments, 0)  # warms up
    return segments * videos / sum(made_here(generator, segments, seed) for seed in range(videos))


def overhead(url: str, generator: VideoGenerator, segments: int, runs: int) -> dict[str, Any]:
    """Seconds of one video served and made in this process, in turns."""
    seconds: dict[str, list[float]] = {"served": [], "in_process": []}
    with httpx.Client(base_url=url, timeout=600) as http:
        for turn in range(runs + 1):
            begin = time.perf_counter()
            body = {"prompt": PROMPTS[turn % len(PROMPTS)], "num_segments": segments, "seed": turn}
            made = http.post("/v1/videos", json=body).json()["id"]
            http.get(f"/v1/videos/{made}/events")
            http.get(f"/v1/videos/{made}/content")
            served = time.perf_counter() - begin
            in_process = made_here(generator, segments, turn)
            if turn:  # the first of each warms up
                seconds["served"].append(served)
                seconds["in_process"].append(in_process)
    ratios = [a / b for a, b in zip(seconds["served"], seconds["in_process"], strict=True)]
    return {
        "segments": segments,
        **{name: {"median": statistics.median(each), "all": each} for name, each in seconds.items()},
        "served_over_in_process": statistics.median(ratios),
    }


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="serve_load.json")
    flags.set_defaults(config=None)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR")
    flags.add_argument("--clients", type=int, default=50)
    flags.add_argument("--seconds", type=float, default=180, help="clients ask for more for so long")
    flags.add_argument("--segments", type=int, default=2, help="of each video")
    flags.add_argument("--overhead-segments", type=int, default=12)
    flags.add_argument("--runs", type=int, default=5, help="of what is compared, in turns")
    flags.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = flags.parse_args()
    if min(arguments.clients, arguments.segments, arguments.runs) < 1:
        raise InputError("--clients, --segments and --runs: expected 1 or more")
    bundle = load_bundle(existing(arguments.bundle, "--bundle"))
    generator = VideoGenerator(bundle)
    settings = [f"serve.port={free_port()}", "serve.requests_per_minute=1000000", *arguments.overrides]
    config = served_config(bundle.config, arguments.config, settings)
    result: dict[str, Any] = {"machine": machine(), "bundle": bundle.path.name, "settings": arguments.overrides}
    with tempfile.TemporaryDirectory() as data, connect(config), serve_bundle(config, bundle, Path(data)) as url:
        if "overhead" in arguments.parts:
            result["overhead"] = overhead(url, generator, arguments.overhead_segments, arguments.runs)
            print(f"served / in this process: {result['overhead']['served_over_in_process']:.3f}", flush=True)
        if "together" in arguments.parts:
            result["together"] = asyncio.run(together(url, 8, 3, arguments.runs))
            print(f"8 at once: {result['together']['faster']:.2f} times faster than one after another", flush=True)
            print(json.dumps(result["together"]["cpu_s"], indent=2))
        if "load" in arguments.parts:
            before = alone(generator, arguments.segments)
            result["load"] = asyncio.run(load(url, arguments.clients, arguments.seconds, arguments.segments))
            one_process = statistics.mean((before, alone(generator, arguments.segments)))
            result["load"]["one_process_segments_per_s"] = round(one_process, 2)
            print(json.dumps(result["load"], indent=2))
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
