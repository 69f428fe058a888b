"""The simulation (`serve/simulation.py`) against the real service on Ray: same loads, same run.

`python -m benchmarks.simulation --output benchmarks/results/simulation.json`

Measured first: videos one after another (seconds of each stage, and what goes by between them), and 8 clients (what a
batch costs: the one number that is fitted). With these the other loads are predicted. Rounds take turns, for other work
on the machine changes.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from arlon_ray.bundle import load_bundle
from arlon_ray.config import Config
from benchmarks.machine import machine
from benchmarks.serve_load import PROMPTS
from jobs.command_line import BOX, InputError, existing, parser, run
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from jobs.simulate import BATCH_COST, figures
from serve.app import serve_bundle
from serve.settings import served_config
from serve.simulation import STAGES, Load, Simulation, StageModel

ALONE, FITTED = "one client", "8 clients"
TIMINGS = {"ar": "ar_s", "dit": "dit_s", "decoder": "decode_s"}


class Measured:
    """What clients saw of the real service in all rounds of one load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.asked = self.refused = self.videos = 0
        self.seconds = 0.0
        self.latency_s: list[float] = []
        self.first_s: list[float] = []
        self.timings: list[list[dict[str, float]]] = []

    async def round(self, url: str, duration_s: float, seed: int) -> None:
        """Ask for so long, then wait for what was accepted."""
        chance, began = random.Random(seed), time.monotonic()
        async with httpx.AsyncClient(base_url=url, timeout=600) as http, asyncio.TaskGroup() as group:
            if self.load.clients:
                for _ in range(self.load.clients):
                    group.create_task(self._client(http, began + duration_s, chance))
            else:
                while True:
                    await asyncio.sleep(chance.expovariate(self.load.per_minute / 60))
                    if time.monotonic() > began + duration_s:
                        break
                    group.create_task(self._one(http, chance))
        self.seconds += time.monotonic() - began

    async def _client(self, http: httpx.AsyncClient, end: float, chance: random.Random) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(await self._one(http, chance))

    async def _one(self, http: httpx.AsyncClient, chance: random.Random) -> float:
        """One request; seconds until the next one."""
        asked, self.asked = time.monotonic(), self.asked + 1
        body = {"prompt": chance.choice(PROMPTS), "num_segments": self.load.segments[0]}
        answer = await http.post("/v1/videos", json=body)
        if answer.status_code == 429:
            self.refused += 1
            return float(answer.headers["retry-after"])
        path, first = f"/v1/videos/{answer.json()['id']}", True
        async with http.stream("GET", f"{path}/events") as events:
            async for line in events.aiter_lines():
                if first and line == "event: segment.completed":
                    first = False
                    self.first_s.append(time.monotonic() - asked)
        self.latency_s.append(time.monotonic() - asked)
        self.videos += 1
        self.timings.append((await http.get(path)).json()["timings"])
        return 0.0

    def found(self) -> dict[str, float]:
        """In the words of `jobs.simulate.figures`."""
        return {
            "segments_per_s": self.videos * self.load.segments[0] / self.seconds,
            "latency_s": statistics.median(self.latency_s),
            "first_segment_s": statistics.median(self.first_s),
            "refused_share": self.refused / self.asked,
        }


def predicted(
    config: Config, models: dict[str, StageModel], hop_s: float, load: Load, duration_s: float
) -> dict[str, float]:
    """The same of the simulation: of ten of its runs together, where arrivals are drawn."""
    runs = [
        figures(Simulation(config.serve, models, [load], duration_s=duration_s, hop_s=hop_s, seed=seed).run())
        for seed in range(1 if load.clients else 10)
    ]
    own = [its["tenants"][load.tenant] for its in runs if load.tenant in its["tenants"]]
    return {
        "segments_per_s": statistics.mean(its["segments_per_s"] for its in own),
        "latency_s": statistics.median(its["latency_s"]["p50"] for its in own),
        "first_segment_s": statistics.median(its["first_segment_s"]["p50"] for its in own),
        "refused_share": statistics.mean(its["refused_share"] for its in own),
    }


def alone(measured: Measured) -> dict[str, StageModel]:
    """Medians of the stages' seconds where nothing else was made."""

    def seconds(stage: str, first: bool) -> float:
        return statistics.median(
            each[TIMINGS[stage]] for video in measured.timings for each in (video[:1] if first else video[1:])
        )

    return {
        stage: StageModel(seconds(stage, False), seconds(stage, True), batch_cost=BATCH_COST[stage], start_s=5)
        for stage in STAGES
    }


def fitted(
    config: Config, one: Measured, eight: Measured, duration_s: float
) -> tuple[dict[str, StageModel], float, float]:
    """The stages, what goes by before a call, and what all batch costs are multiplied with to fit 8 clients."""
    models = alone(one)
    calls = one.load.segments[0] + 2  # of the longest way through a video
    missing = one.found()["latency_s"] - predicted(config, models, 0.0, one.load, duration_s)["latency_s"]
    hop_s = max(0.0, missing / calls)
    low, high = 0.0, 16.0
    for _ in range(20):
        times = (low + high) / 2
        tried = {name: replace(model, batch_cost=BATCH_COST[name] * times) for name, model in models.items()}
        if predicted(config, tried, hop_s, eight.load, duration_s)["segments_per_s"] > eight.found()["segments_per_s"]:
            low = times
        else:
            high = times
    return tried, hop_s, times


def loads(segments: int, per_s: float) -> dict[str, Load]:
    """What is predicted; `per_s`: segments a second that 8 clients got."""
    capacity = 60 * per_s / segments
    return {
        "2 clients": Load("all", clients=2, segments=(segments,)),
        "4 clients": Load("all", clients=4, segments=(segments,)),
        "4 clients, twice as long": Load("all", clients=4, segments=(2 * segments,)),
        "random, half of what it can": Load("all", per_minute=0.5 * capacity, segments=(segments,)),
        "random, twice what it can": Load("all", per_minute=2 * capacity, segments=(segments,)),
    }


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="simulation.json")
    flags.set_defaults(config=None)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR")
    flags.add_argument("--seconds", type=float, default=40, help="of one load in one round")
    flags.add_argument("--segments", type=int, default=3, help="of a video")
    flags.add_argument("--rounds", type=int, default=2)
    arguments = flags.parse_args()
    if min(arguments.segments - 1, arguments.rounds, arguments.seconds) < 1:
        raise InputError("--segments: expected 2 or more; --rounds and --seconds: 1 or more")
    bundle = load_bundle(existing(arguments.bundle, "--bundle"))
    own = [f"serve.{stage}.max_replicas=1" for stage in STAGES] + ["serve.max_queued=6"]
    settings = [f"serve.port={free_port()}", "serve.requests_per_minute=1000000", *own, *arguments.overrides]
    config = served_config(bundle.config, arguments.config, settings)
    segments, seconds = arguments.segments, arguments.seconds
    all_loads = {
        ALONE: Load("all", clients=1, segments=(segments,)),
        FITTED: Load("all", clients=8, segments=(segments,)),
    }
    measured = {name: Measured(load) for name, load in all_loads.items()}
    with tempfile.TemporaryDirectory() as data, connect(config), serve_bundle(config, bundle, Path(data)) as url:
        asyncio.run(Measured(all_loads[FITTED]).round(url, seconds / 2, 0))  # warms up
        for number in range(arguments.rounds):
            for name in list(measured):
                asyncio.run(measured[name].round(url, seconds, number))
            if number == 0:
                per_s = measured[FITTED].found()["segments_per_s"]
                measured |= {name: Measured(load) for name, load in loads(segments, per_s).items()}
                for name in list(measured)[2:]:
                    asyncio.run(measured[name].round(url, seconds, number))
    models, hop_s, times = fitted(config, measured[ALONE], measured[FITTED], seconds)
    rows: dict[str, Any] = {}
    for name, each in measured.items():
        real, simulated = each.found(), predicted(config, models, hop_s, each.load, seconds)
        errors = {what: simulated[what] / real[what] - 1 for what in real if what != "refused_share"}
        rows[name] = {"videos": each.videos, "measured": real, "simulated": simulated, "error": errors}
        shown = "  ".join(f"{what} {real[what]:.2f} {simulated[what]:.2f} ({errors[what]:+.0%})" for what in errors)
        print(f"{name}: {shown}  refused {real['refused_share']:.0%} {simulated['refused_share']:.0%}", flush=True)
    stages = {
        name: {"seconds": m.seconds, "first_s": m.first_s, "batch_cost": m.batch_cost} for name, m in models.items()
    }
    result = {"machine": machine(), "stages": stages, "hop_s": hop_s, "batch_costs_times": times, "loads": rows}
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
