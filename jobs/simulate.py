"""The service under load before it is bought: a simulation of its deployments with the service's own policies.

`python jobs/simulate.py --config opensora-v1.2 --gpu h100 --arrivals 6/min --segments 4-8 --replicas ar=1,dit=4-8`
`… --load studio=20/min --load trial=2/min --set serve.tenants.studio.weight=2` has tenants; with `--clients 50` so many
ask for the next video as soon as they have the last one. Seconds of a segment are reckoned (docs/scaling.md) or yours:
`--seconds ar=0.5,dit=3,decoder=0.2`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.config import Config, override
from arlon_ray.planning.hardware import CPU, GPUS
from arlon_ray.planning.serving import segment_seconds
from jobs.command_line import InputError, aligned, parser, read_config, run
from serve.simulation import STAGES, Load, Simulation, StageModel

#: What each further segment of a batch adds to the time of one. Measured on a CPU (docs/serving.md, eight at once: the
#: AR takes a third of the CPU time, the DiT four fifths); the decoder has no batches.
BATCH_COST = {"ar": 0.25, "dit": 0.8, "decoder": 1.0}
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
ALL = "all"


def by_stage(text: str) -> dict[str, str]:
    """STAGE=VALUE,…"""
    found = dict(part.partition("=")[::2] for part in text.split(","))
    if not set(found) <= set(STAGES) or not all(found.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected STAGE=VALUE,… of {', '.join(STAGES)}")
    return found


def numbers(text: str) -> dict[str, float]:
    """STAGE=NUMBER,… of numbers that are not negative."""
    try:
        found = {stage: float(value) for stage, value in by_stage(text).items()}
    except ValueError:
        found = {"": -1.0}
    if not all(0 <= value < 1e9 for value in found.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected STAGE=NUMBER,…, as ar=0.5,dit=3,decoder=0.2")
    return found


def per_minute(text: str) -> float:
    """N/s, N/min or N/h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)/(s|min|h)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected arrivals as 30/min, 2/s or 500/h")
    return float(found[1]) * 60 / UNITS[found[2]]


def load(text: str) -> tuple[str, float]:
    """TENANT=ARRIVALS."""
    name, _, rate = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}: expected TENANT=ARRIVALS, as studio=20/min")
    return name, per_minute(rate)


def lengths(text: str) -> tuple[int, ...]:
    """N or FROM-TO."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of segments, as 8, or 4-8")
    return tuple(range(first, last + 1))


def duration(text: str) -> float:
    """Seconds out of 90s, 30min or 2h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a duration as 90s, 30min or 2h")
    return float(found[1]) * UNITS[found[2]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    flags = parser(__doc__ or "", output="", default_config="opensora-v1.2")
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    asked = flags.add_argument_group("what is asked for")
    asked.add_argument("--arrivals", type=per_minute, metavar="N/min", help="videos, at random times (default: 1/min)")
    asked.add_argument("--clients", type=int, default=0, metavar="N", help="instead: so many, each one video at a time")
    asked.add_argument("--load", type=load, action="append", default=[], metavar="TENANT=N/min", help="of one tenant")
    asked.add_argument("--segments", type=lengths, default=(4,), metavar="N|A-B", help="of a video (default: 4)")
    asked.add_argument("--duration", type=duration, default=3600.0, metavar="TIME", help="30min, 2h (default: 1h)")
    asked.add_argument("--seed", type=int, default=0, help="of the arrivals")
    place = flags.add_argument_group("what it runs on")
    place.add_argument("--replicas", type=by_stage, default={}, metavar="STAGE=N|A-B,…", help="else as configured")
    place.add_argument("--gpu", choices=[*GPUS, "cpu"], default="h100", help="of AR, DiT and VAE (default: h100)")
    place.add_argument("--seconds", type=numbers, default={}, metavar="STAGE=S,…", help="of a segment, alone")
    place.add_argument(
        "--batch-cost", type=numbers, default={}, metavar="STAGE=SHARE,…",
        help="of a segment's seconds that one more in a batch adds (default: ar=0.25,dit=0.8)",
    )  # fmt: skip
    place.add_argument("--start", type=float, default=60.0, metavar="S", help="until a new replica works (default: 60)")
    place.add_argument("--hop", type=float, default=0.0, metavar="S", help="before each call of a stage")
    place.add_argument("--cores", type=float, metavar="N", help="that all replicas share (default: enough)")
    return flags.parse_args(arguments)


def with_replicas(config: Config, replicas: dict[str, str]) -> Config:
    """The configuration with these numbers of replicas: "2", or "1-4" to scale between."""
    settings = []
    for stage, text in replicas.items():
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not found:
            raise InputError(f"--replicas {stage}={text}: expected a number, or FROM-TO")
        settings += [f"serve.{stage}.min_replicas={found[1]}", f"serve.{stage}.max_replicas={found[2] or found[1]}"]
    return override(config, settings)


def stage_models(config: Config, arguments: argparse.Namespace) -> dict[str, StageModel]:
    """Seconds of the stages: those of the flags, else reckoned."""
    hardware = CPU if arguments.gpu == "cpu" else GPUS[arguments.gpu]
    given, later = arguments.seconds, segment_seconds(config, hardware)._asdict()
    first, costs = segment_seconds(config, hardware, first=True)._asdict(), BATCH_COST | arguments.batch_cost
    return {
        stage: StageModel(
            given[stage] if stage in given else later[stage],
            None if stage in given else first[stage],
            batch_cost=costs[stage],
            start_s=arguments.start,
        )
        for stage in STAGES
    }


def figures(simulation: Simulation) -> dict[str, Any]:
    """What the simulated service did, for each tenant and each deployment."""
    tenants = {}
    for name in sorted(simulation.asked):
        videos = [video for video in simulation.videos if video.tenant == name]
        refused = {code: count for (tenant, code), count in simulation.refused.items() if tenant == name}
        tenants[name] = {
            "asked": simulation.asked[name],
            "videos": len(videos),
            "refused_429": refused,
            "refused_share": sum(refused.values()) / simulation.asked[name],
            "videos_per_min": 60 * len(videos) / simulation.now,
            "segments_per_s": sum(video.segments for video in videos) / simulation.now,
            "wait_s": percentiles([video.turn_s - video.asked_s for video in videos]),
            "first_segment_s": percentiles([video.first_s - video.asked_s for video in videos]),
            "latency_s": percentiles([video.ended_s - video.asked_s for video in videos]),
        }
    stages = {
        name: {
            "seconds": stage.model.seconds,
            "utilisation": stage.busy_s / stage.alive_s if stage.alive_s else 0.0,
            "mean_batch": stage.shared_s / stage.busy_s if stage.busy_s else 0.0,
            "mean_replicas": stage.alive_s / simulation.now,
            "most_replicas": stage.most,
        }
        for name, stage in simulation.stages.items()
    }
    return {"seconds": simulation.now, "tenants": tenants, "stages": stages}


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and the longest; nothing of nothing."""
    if not values:
        return {}
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 90, 99)} | {"max": max(values)}


def tables(found: dict[str, Any]) -> str:
    """Two tables: tenants and deployments."""
    rows = [("TENANT", "ASKED", "REFUSED", "VIDEOS/MIN", "WAIT p50", "p99", "FIRST p50", "p99", "VIDEO p50", "p99")]
    for name, its in found["tenants"].items():
        times = [
            its[what].get(share) for what in ("wait_s", "first_segment_s", "latency_s") for share in ("p50", "p99")
        ]
        shown = ["-" if value is None else f"{value:.1f} s" for value in times]
        rows.append((name, str(its["asked"]), f"{its['refused_share']:.0%}", f"{its['videos_per_min']:.2f}", *shown))
    stages = [("DEPLOYMENT", "SEGMENT", "BUSY", "BATCH", "REPLICAS", "MOST")]
    for name, its in found["stages"].items():
        seconds, busy, batch = f"{its['seconds']:.2f} s", f"{its['utilisation']:.0%}", f"{its['mean_batch']:.1f}"
        stages.append((name, seconds, busy, batch, f"{its['mean_replicas']:.1f}", str(its["most_replicas"])))
    return f"{aligned(rows)}\n\n{aligned(stages)}"


def main() -> None:
    """Command line."""
    arguments = parse()
    if arguments.clients < 0 or min(arguments.start, arguments.hop) < 0 or (arguments.cores or 1) <= 0:
        raise InputError("--clients, --start, --hop: expected 0 or more; --cores: more than 0")
    if bool(arguments.arrivals) + bool(arguments.clients) + bool(arguments.load) > 1:
        raise InputError("--arrivals, --clients and --load exclude each other")
    config = with_replicas(read_config(arguments), arguments.replicas)
    if max(arguments.segments) > config.serve.max_segments:
        raise InputError(f"--segments: at most serve.max_segments={config.serve.max_segments}")
    rates = dict(arguments.load) or {ALL: 0.0 if arguments.clients else arguments.arrivals or 1.0}
    loads = [Load(name, rate, arguments.clients, arguments.segments) for name, rate in rates.items()]
    models = stage_models(config, arguments)
    found = figures(
        Simulation(
            config.serve, models, loads, duration_s=arguments.duration, hop_s=arguments.hop, cores=arguments.cores,
            seed=arguments.seed,
        ).run()
    )  # fmt: skip
    print(tables(found))
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
