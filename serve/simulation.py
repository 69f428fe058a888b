"""The service under load, as a discrete-event simulation: the same queue, window and scaling policy, without models.

A stage's replica runs up to `max_batch` segments at the same time. One alone takes `seconds`; among n each takes
1 + (n - 1) * `batch_cost` times as long. Everything is seeded: the same load gives the same figures.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from arlon_ray.config import DeploymentConfig, ServeConfig
from serve.fair_queue import FairQueue
from serve.quotas import queue_refusal, retry_after
from serve.scaling import replicas_for_work

STAGES = ("ar", "dit", "decoder")
_LOOK_S = 1.0  # between looks of the autoscaler
_LOOK_BACK_S = 10.5  # as in `serve.deployments`


@dataclass(frozen=True)
class StageModel:
    """One deployment: what a segment takes alone in a replica, and what each further one in a batch adds to that.

    `batch_cost` 1: nothing is gained by batches; 0: they cost nothing. `first_s`: a video's first segment, where it
    differs. `start_s`: until a new replica has loaded its model.
    """

    seconds: float
    first_s: float | None = None
    batch_cost: float = 1.0
    start_s: float = 10.0


@dataclass(frozen=True)
class Load:
    """What one tenant asks for: `per_minute` (a Poisson process; who is refused goes away), or `clients` that ask for
    the next video when they have the last one (and come again, when they are refused, as long after as they are told).

    `segments`: lengths of videos, drawn evenly. `begin_s`: when it starts.
    """

    tenant: str
    per_minute: float = 0.0
    clients: int = 0
    segments: tuple[int, ...] = (4,)
    begin_s: float = 0.0


@dataclass(eq=False)
class SimulatedVideo:
    """One on its way. Times are seconds since the beginning."""

    id: str
    tenant: str
    segments: int
    asked_s: float
    turn_s: float = math.nan
    first_s: float = math.nan
    ended_s: float = math.nan
    planning: int = 0  # segments whose plan has begun
    planned: int = 0
    rendering: int = 0
    rendered: int = 0
    decoding: int = 0
    decoded: int = 0


@dataclass(eq=False)
class _Call:
    left_s: float  # of work, alone
    done: Callable[[], None]


@dataclass(eq=False)
class _Replica:
    ready_s: float
    calls: list[_Call] = field(default_factory=list)
    leaving: bool = False


class _Stage:
    """A deployment: calls go to the replica that has fewest."""

    def __init__(self, name: str, model: StageModel, settings: DeploymentConfig, batch: int) -> None:
        self.name, self.model, self.settings, self.batch = name, model, settings, batch
        self.replicas = [_Replica(0.0) for _ in range(settings.min_replicas)]
        self.line: deque[_Call] = deque()
        self.samples: deque[float] = deque(maxlen=math.ceil(max(_LOOK_BACK_S, settings.upscale_delay_s) / _LOOK_S))
        self.wanted_since: dict[int, float] = {}  # more (1) or fewer (-1) replicas
        self.busy_s = self.alive_s = self.shared_s = 0.0
        self.most = len(self.replicas)

    def seconds(self, index: int) -> float:
        return self.model.first_s if index == 0 and self.model.first_s is not None else self.model.seconds

    def place(self, now: float) -> None:
        """Hand waiting calls to replicas that take them, the emptiest first."""
        while self.line:
            free = [
                each for each in self.replicas
                if each.ready_s <= now and not each.leaving and len(each.calls) < self.settings.max_ongoing_requests
            ]  # fmt: skip
            if not free:
                return
            min(free, key=lambda each: len(each.calls)).calls.append(self.line.popleft())

    def rates(self) -> list[tuple[_Replica, list[_Call], float]]:
        """Replicas at work, what they work on, and how fast each of these goes on."""
        found = []
        for each in self.replicas:
            if at_work := each.calls[: self.batch]:
                found.append((each, at_work, 1 / (1 + (len(at_work) - 1) * self.model.batch_cost)))
        return found

    def look(self, now: float) -> None:
        """What Serve's controller does now and then, with the service's own policy."""
        settings, current = self.settings, sum(not each.leaving for each in self.replicas)
        self.samples.append(len(self.line) + sum(len(each.calls) for each in self.replicas))
        ask = SimpleNamespace(
            total_num_requests=sum(self.samples) / len(self.samples), aggregated_metrics={},
            config=SimpleNamespace(get_target_ongoing_requests=lambda: settings.target_ongoing_requests),
        )  # fmt: skip
        wanted = min(settings.max_replicas, max(settings.min_replicas, replicas_for_work(ask)[0]))
        way = (wanted > current) - (wanted < current)
        self.wanted_since = {way: self.wanted_since.get(way, now)} if way else {}
        delay = settings.upscale_delay_s if way > 0 else settings.downscale_delay_s
        if way and now - self.wanted_since[way] >= delay:
            for _ in range(wanted - current):
                self.replicas.append(_Replica(now + self.model.start_s))
            staying = [each for each in self.replicas if not each.leaving]
            for each in sorted(staying, key=lambda each: len(each.calls))[: max(0, current - wanted)]:
                each.leaving = True
            self.wanted_since = {}
        self.replicas = [each for each in self.replicas if each.calls or not each.leaving]
        self.most = max(self.most, len(self.replicas))


class Simulation:
    """One run of the service."""

    def __init__(
        self,
        serve: ServeConfig,
        stages: dict[str, StageModel],
        loads: Sequence[Load],
        *,
        duration_s: float,
        hop_s: float = 0.0,
        cores: float | None = None,
        seed: int = 0,
    ) -> None:
        """Clients ask for `duration_s`; what they asked for is finished after that.

        `hop_s` goes by before each call of a stage. `cores`: of a machine that all replicas share, each at work taking
        one; None: each has what it needs.
        """
        self.serve, self.loads, self.duration_s, self.hop_s, self.cores = serve, loads, duration_s, hop_s, cores
        sizes = {"ar": serve.ar, "dit": serve.dit, "decoder": serve.decoder}
        self.stages = {
            name: _Stage(name, stages[name], sizes[name], 1 if name == "decoder" else sizes[name].max_batch)
            for name in STAGES
        }
        self.now = 0.0
        self.queue: FairQueue[SimulatedVideo] = FairQueue(serve.tenant)
        self.running: dict[str, SimulatedVideo] = {}
        self.videos: list[SimulatedVideo] = []
        self.asked: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self._followed: dict[str, Callable[[], None]] = {}  # what a client does when it has its video
        self._mean_s = 10.0
        self._chance = random.Random(seed)
        self._order = itertools.count()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> Simulation:
        """To the end."""
        for load in self.loads:
            if load.clients:
                for _ in range(load.clients):
                    self._at(load.begin_s, lambda load=load: self._ask(load))  # type: ignore[misc]
            elif load.per_minute:
                self._at(load.begin_s + self._gap(load), lambda load=load: self._arrive(load))  # type: ignore[misc]
        self._at(0.0, self._look)
        while self._timers and (self.now < self.duration_s or self.running or len(self.queue)):
            self._go_on()
        return self

    def _at(self, moment: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (moment, next(self._order), call))

    def _gap(self, load: Load) -> float:
        return self._chance.expovariate(load.per_minute / 60)

    def _go_on(self) -> None:
        """To the next thing that happens: a call ends, or a timer does."""
        at_work = [(stage, *each) for stage in self.stages.values() for each in stage.rates()]
        share = 1.0 if self.cores is None else min(1.0, self.cores / max(1, len(at_work)))
        ends = min((call.left_s / (rate * share) for *_, calls, rate in at_work for call in calls), default=math.inf)
        step = max(0.0, min(ends, self._timers[0][0] - self.now))
        self.now += step
        for stage in self.stages.values():
            stage.alive_s += step * sum(each.ready_s <= self.now for each in stage.replicas)
        done: list[_Call] = []
        for stage, replica, calls, rate in at_work:
            stage.busy_s += step
            stage.shared_s += step * len(calls)
            for call in calls:
                call.left_s -= step * rate * share
                if call.left_s <= 1e-9:
                    replica.calls.remove(call)
                    done.append(call)
        for call in done:
            call.done()
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()
        for stage in self.stages.values():
            stage.place(self.now)

    def _look(self) -> None:
        for stage in self.stages.values():
            stage.look(self.now)
        self._at(self.now + _LOOK_S, self._look)

    def _arrive(self, load: Load) -> None:
        if self.now < self.duration_s:
            self._ask(load)
            self._at(self.now + self._gap(load), lambda: self._arrive(load))

    def _ask(self, load: Load) -> None:
        if self.now >= self.duration_s:
            return
        tenant, running = load.tenant, Counter(each.tenant for each in self.running.values())
        self.asked[tenant] += 1
        refusal = queue_refusal(
            self.serve, tenant, len(self.queue), self.queue.of(tenant), running.total(), running[tenant]
        )
        if refusal:
            self.refused[tenant, refusal.code] += 1
            if load.clients:
                self._at(self.now + retry_after(self.serve, self._mean_s), lambda: self._ask(load))
            return
        number = f"video{len(self.videos)}"
        video = SimulatedVideo(number, tenant, self._chance.choice(load.segments), self.now)
        self.videos.append(video)
        self.queue.add(video)
        self._start_waiting()
        if load.clients:
            self._followed[number] = lambda: self._ask(load)

    def _start_waiting(self) -> None:
        while len(self.running) < self.serve.most_running and (video := self.queue.pop(self.running.values())):
            self.running[video.id] = video
            video.turn_s = self.now
            self._advance(video)

    def _advance(self, video: SimulatedVideo) -> None:
        """Begin what may begin, as `serve.orchestrator` does: one segment of a video in each stage."""
        one_at_a_time = video.planning == video.planned
        if one_at_a_time and video.planning < min(video.segments, video.rendering + self.serve.planned_ahead + 1):
            video.planning += 1
            self._call("ar", video, video.planning - 1, "planned")
        # the DiT goes on when the decoder has begun the segment before
        ready = video.rendering == video.rendered == video.decoding
        if ready and video.rendering < video.planned:
            video.rendering += 1
            self._call("dit", video, video.rendering - 1, "rendered")
            self._advance(video)  # the window has moved
        if video.decoding == video.decoded and video.decoding < video.rendered:
            video.decoding += 1
            self._call("decoder", video, video.decoding - 1, "decoded")
            self._advance(video)

    def _call(self, name: str, video: SimulatedVideo, index: int, counted: str) -> None:
        stage = self.stages[name]

        def done() -> None:
            setattr(video, counted, index + 1)
            if counted == "decoded" and index == 0:
                video.first_s = self.now
            if video.decoded == video.segments:
                self._end(video)
            else:
                self._advance(video)

        self._at(self.now + self.hop_s, lambda: stage.line.append(_Call(stage.seconds(index), done)))

    def _end(self, video: SimulatedVideo) -> None:
        video.ended_s = self.now
        del self.running[video.id]
        self._mean_s = 0.7 * self._mean_s + 0.3 * (self.now - video.turn_s)
        if video.id in self._followed:
            self._at(self.now, self._followed.pop(video.id))
        self._start_waiting()
