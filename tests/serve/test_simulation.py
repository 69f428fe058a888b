"""The simulated service: against what can be reckoned by hand, and what it is for."""

from __future__ import annotations

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from arlon_ray.config import ServeConfig, load_config
from jobs.simulate import figures
from serve.simulation import Load, Simulation, StageModel
from tests.scripts import said

STAGES = {"ar": StageModel(1.0), "dit": StageModel(2.0), "decoder": StageModel(0.5)}


def settings(*overrides: str) -> ServeConfig:
    one = [f"serve.{stage}.max_replicas=1" for stage in STAGES]
    return load_config("tiny", [*one, *(f"serve.{each}" for each in overrides)]).serve


def simulated(serve: ServeConfig, *loads: Load, stages: dict[str, StageModel] = STAGES, **more: Any) -> Simulation:
    return Simulation(serve, stages, loads, **{"duration_s": 600.0, **more}).run()


def test_one_video_takes_what_its_slowest_stage_takes() -> None:
    """1 s of AR, 4 times 2 s of DiT, 0.5 s of decoding; every call half a second late."""
    (video,) = simulated(settings(), Load("a", clients=1), duration_s=1.0).videos
    assert (video.turn_s, video.first_s, video.ended_s) == pytest.approx((0.0, 3.5, 9.5))
    (late,) = simulated(settings(), Load("a", clients=1), duration_s=1.0, hop_s=0.5).videos
    assert late.ended_s == pytest.approx(9.5 + 6 * 0.5)
    first = STAGES | {"dit": StageModel(2.0, first_s=5.0)}
    (slow,) = simulated(settings(), Load("a", clients=1), duration_s=1.0, stages=first).videos
    assert (slow.first_s, slow.ended_s) == pytest.approx((6.5, 12.5))


def test_a_slow_decoder_holds_the_dit_up() -> None:
    """As in the orchestrator: a segment is rendered while the one before is decoded, and no further."""
    stages = STAGES | {"decoder": StageModel(10.0)}
    (video,) = simulated(settings(), Load("a", clients=1), duration_s=1.0, stages=stages).videos
    assert video.ended_s == pytest.approx(1 + 2 + 4 * 10)


@pytest.mark.parametrize(("batch_cost", "seconds"), [(0.0, 1), (0.5, 2.5), (1.0, 4)])
def test_what_batches_cost(batch_cost: float, seconds: float) -> None:
    nothing = StageModel(0.0)
    stages = {"ar": nothing, "dit": StageModel(1.0, batch_cost=batch_cost), "decoder": nothing}
    four = simulated(settings(), Load("a", clients=4, segments=(1,)), duration_s=0.5, stages=stages)
    assert [video.ended_s for video in four.videos] == pytest.approx([seconds] * 4)
    assert figures(four)["stages"]["dit"]["mean_batch"] == pytest.approx(4)
    apart = simulated(settings("dit.max_batch=1"), Load("a", clients=4, segments=(1,)), duration_s=0.5, stages=stages)
    assert [video.ended_s for video in apart.videos] == pytest.approx([1, 2, 3, 4])


def test_it_is_the_queue_of_theory_where_theory_knows_it() -> None:
    """M/D/1: one server, Poisson arrivals, equal work: a mean wait of u / (2 (1 - u)) services at utilisation u."""
    nothing, use = StageModel(0.0), 0.7
    serve = settings("max_running=1", "max_queued=1000", "max_queued_per_key=1000")
    stages = {"ar": nothing, "dit": StageModel(1.0), "decoder": nothing}
    found = simulated(serve, Load("a", per_minute=60 * use, segments=(1,)), duration_s=40_000, stages=stages, seed=3)
    waits = [video.turn_s - video.asked_s for video in found.videos]
    assert statistics.mean(waits) == pytest.approx(use / (2 * (1 - use)), rel=0.1)
    assert figures(found)["stages"]["dit"]["utilisation"] == pytest.approx(use, rel=0.03)


def test_a_flood_is_refused_and_starves_nobody() -> None:
    """By itself the flood could use the service four times over; who asks for little waits for about one turn."""
    serve = settings("max_running=2", "max_queued=20", "max_queued_per_key=10")
    flood, few = Load("flood", per_minute=60), Load("few", per_minute=1)
    one_video_s = figures(simulated(serve, few))["tenants"]["few"]["latency_s"]["p50"]
    tenants = figures(simulated(serve, flood, few, duration_s=3600))["tenants"]
    assert tenants["flood"]["refused_share"] > 0.5 and tenants["few"]["refused_share"] == 0
    assert tenants["flood"]["refused_429"].keys() == {"too_many_queued"}
    assert tenants["few"]["wait_s"]["p90"] < 2 * one_video_s < tenants["flood"]["wait_s"]["p50"] / 2
    everybody = figures(simulated(serve, Load("flood", per_minute=61), duration_s=3600))["tenants"]["flood"]
    assert tenants["few"]["wait_s"]["p50"] < everybody["wait_s"]["p50"] / 4  # without tenants all wait alike


def test_weights_share_what_there_is() -> None:
    serve = settings("max_running=2", "tenants.big.weight=3", "max_queued=100")
    found = simulated(serve, Load("big", clients=20), Load("small", clients=20), duration_s=2000)
    until_then = [video for video in found.videos if video.ended_s < 2000]
    big = sum(video.tenant == "big" for video in until_then)
    assert big / len(until_then) == pytest.approx(0.75, abs=0.03)


def test_replicas_follow_the_work_and_go_again() -> None:
    scaled = ["dit.max_replicas=4", "dit.min_replicas=0", "dit.target_ongoing_requests=1", "dit.upscale_delay_s=5"]
    serve = settings(*scaled, "dit.downscale_delay_s=30")
    burst = simulated(
        serve, Load("a", clients=8, segments=(20,)), Load("b", per_minute=0.05, begin_s=1000), duration_s=1
    )
    dit = figures(burst)["stages"]["dit"]
    assert dit["most_replicas"] == 4
    assert burst.videos[0].first_s > 5 + 10  # the delay, and the start of a replica
    alone = simulated(settings(), Load("a", clients=8, segments=(20,)), duration_s=1)
    assert burst.now < 0.6 * alone.now
    now_and_then = figures(simulated(serve, Load("b", per_minute=0.2), duration_s=3000))
    assert 0 < now_and_then["stages"]["dit"]["mean_replicas"] < 0.5


def test_the_same_seed_is_the_same_run() -> None:
    def one(seed: int) -> dict[str, Any]:
        return figures(simulated(settings(), Load("a", per_minute=9, segments=(1, 2, 3)), seed=seed))

    assert one(1) == one(1) != one(2)
    assert all(not math.isnan(video.ended_s) for video in simulated(settings(), Load("a", clients=9)).videos)


def test_a_machine_that_all_share_is_slower() -> None:
    plenty = simulated(settings(), Load("a", clients=4))
    shared = simulated(settings(), Load("a", clients=4), cores=1)
    assert len(shared.videos) < 0.8 * len(plenty.videos)


def test_command_line(tmp_path: Path) -> None:
    call = partial(said, "simulate")

    file, seconds = tmp_path / "found.json", "--seconds=ar=0.5,dit=3,decoder=0.2"
    two = ("--load", "studio=20/min", "--load", "trial=1/min")
    shown = call("--config=tiny", seconds, "--replicas=ar=1,dit=1-2", *two, "--duration=10min", f"--output={file}")
    found = json.loads(file.read_text())
    assert "studio" in shown and "decoder" in shown and set(found["tenants"]) == {"studio", "trial"}
    assert found["stages"]["dit"]["seconds"] == 3 and found["stages"]["dit"]["most_replicas"] <= 2
    assert "all " in call("--gpu=h100", "--arrivals=0.5/min", "--segments=2-3", "--duration=30min")
    for wrong, says in (
        (("--arrivals=fast",), "expected arrivals as 30/min"),
        (("--segments=8-4",), "expected a number of segments"),
        (("--replicas=dti=2",), "expected STAGE=VALUE"),
        (("--config=tiny", "--replicas=dit=x"), "expected a number, or FROM-TO"),
        (("--seconds=ar=-1",), "expected STAGE=NUMBER"),
        (("--config=tiny", "--clients=2", "--arrivals=1/min"), "exclude each other"),
        (("--config=tiny", "--segments=999"), "at most serve.max_segments=256"),
        (("--config=tiny", "--replicas=dit=3-2"), "min_replicas=3 is above max_replicas=2"),
    ):
        assert says in call(*wrong, code=2)


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def cpu_models(together: dict[str, Any], times: float = 1.0) -> dict[str, StageModel]:
    """Out of the CPU seconds that the real service took for its requests, one by one and all at once."""
    names = {"ar": "ArPlanner", "dit": "DiTRenderer", "decoder": "FrameDecoder"}
    alone, shared = (together["cpu_s"][way] for way in ("one_by_one", "at_once"))
    requests, segments = together["requests"], together["requests"] * together["segments"]
    return {
        stage: StageModel(
            times * alone[name] / segments, batch_cost=(requests * shared[name] / alone[name] - 1) / (requests - 1)
        )
        for stage, name in names.items()
    }


def test_eight_at_once_as_the_real_service_made_them() -> None:
    """benchmarks/results/serve_together.json, a quiet machine of two cores: stages by their CPU seconds, what goes by
    between them by the requests one by one; the seconds of eight at once are predicted.
    """
    together = json.loads((RESULTS / "serve_together.json").read_text())["together"]
    models, segments = cpu_models(together), (together["segments"],)
    one_s = statistics.median(together["one_by_one"]) / together["requests"]

    def last_s(clients: int, hop_s: float) -> float:
        load = Load("a", clients=clients, segments=segments)
        return simulated(settings(), load, stages=models, duration_s=0.001, hop_s=hop_s, cores=2).now

    hop_s = (one_s - last_s(1, 0.0)) / (segments[0] + 2)
    assert last_s(1, hop_s) == pytest.approx(one_s)
    assert last_s(together["requests"], hop_s) == pytest.approx(statistics.median(together["at_once"]), rel=0.2)


def test_fifty_clients_as_the_real_service_bore_them() -> None:
    """benchmarks/results/serve_load.json, three minutes: how fast the machine was that day is fitted to the throughput;
    times and refusals are predicted.
    """
    real = json.loads((RESULTS / "serve_load.json").read_text())["load"]
    together = json.loads((RESULTS / "serve_together.json").read_text())["together"]

    def found(times: float) -> dict[str, Any]:
        load = Load("a", clients=real["clients"], segments=(2,))
        models = cpu_models(together, times)
        run = simulated(load_config("tiny").serve, load, stages=models, duration_s=180, cores=2)
        return figures(run)["tenants"]["a"]

    low, high = 0.2, 10.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle)["segments_per_s"] > real["segments_per_s"] else (low, middle)
    its = found(low)
    assert its["segments_per_s"] == pytest.approx(real["segments_per_s"], rel=0.02)
    assert its["latency_s"]["p50"] == pytest.approx(real["latency_s"]["p50"], rel=0.2)
    assert its["first_segment_s"]["p50"] == pytest.approx(real["first_segment_s"]["p50"], rel=0.2)
    assert its["refused_429"]["too_many_queued"] == pytest.approx(real["refused_429"], rel=0.2)
