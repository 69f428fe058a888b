"""What a project takes before it is begun: hours, storage, network and money of each stage, and what holds it up.

`python jobs/plan.py --config opensora-v1.2 --videos 10M --seconds-per-video 8 --gpus 256 --gpu h100 --cpu-cores 4096`
`… --requests-per-hour 500 --segments 6` adds serving; `--memory` says what fits into which GPU (tens of seconds for a
large model). docs/scaling.md has the formulas, what they were fitted to, and how well they predict. Prices are
examples: give your own.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict
from typing import Any

from arlon_ray.config import Config
from arlon_ray.planning.dataset import Videos
from arlon_ray.planning.hardware import CPU, GPUS, Hardware, with_rates
from arlon_ray.planning.serving import BUSY, ServingPlan, plan_serving
from arlon_ray.planning.stages import (
    Cluster,
    Prices,
    StagePlan,
    plan_preprocess,
    plan_tokens,
    plan_training,
    rows_of,
    trained_stages,
)
from jobs.command_line import InputError, existing, parser, read_config, run
from jobs.plan_tables import memory_tables, print_plan

#: What a letter behind a number says, and units that may follow.
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
UNITS = ("b/s", "bytes", "bits", "/s", "b")
NUMBER = re.compile(r"(\d+(?:_\d+)*(?:\.\d+)?|\.\d+)\s*([a-zA-Z/]*)")
HOURS_A_MONTH = 730


def number(text: str) -> float:
    """A number with a letter for its size: 10M, 2k, 1.5TB, 25GB/s. Raises ArgumentTypeError otherwise."""
    found = NUMBER.fullmatch(text.strip())
    if found:
        digits, letters = found.group(1).replace("_", ""), found.group(2).lower()
        for unit in ("", *UNITS):
            if letters.endswith(unit) and (size := letters.removesuffix(unit)) in FACTORS:
                return float(digits) * FACTORS[size]
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number such as 500, 2k, 10M or 1.5TB")


def positive(text: str) -> float:
    """A number above 0."""
    if (value := number(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")


def whole(text: str) -> int:
    """A whole number, 0 or more."""
    if (value := number(text)) == int(value):
        return int(value)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HEIGHTxWIDTH, as 720x1280")
    return int(found.group(1)), int(found.group(2))


def flags() -> argparse.ArgumentParser:
    """The command line."""
    result = parser(__doc__ or "", output="", default_config="opensora-v1.2")
    result.formatter_class = argparse.RawDescriptionHelpFormatter
    data = result.add_argument_group("the videos")
    data.add_argument("--videos", type=positive, default=1e6, metavar="N", help="files (10M, 2k; default: 1M)")
    data.add_argument("--seconds-per-video", type=positive, default=8.0, metavar="S", help="default: 8")
    data.add_argument("--source-size", type=size, default=(720, 1280), metavar="HxW", help="pixels (default: 720x1280)")
    data.add_argument("--source-fps", type=positive, default=30.0, metavar="N", help="default: 30")
    data.add_argument("--source-bits", type=positive, default=4e6, metavar="N", help="a second of a file (default: 4M)")
    data.add_argument("--epochs", type=positive, metavar="N", help="of every training, instead of its steps")
    cluster = result.add_argument_group("the cluster")
    cluster.add_argument("--gpus", type=whole, default=8, metavar="N", help="0: everything on CPU cores (default: 8)")
    cluster.add_argument("--gpu", choices=list(GPUS), default="h100", help="all but h100 are scaled by data sheets")
    cluster.add_argument("--gpus-per-node", type=whole, default=8, metavar="N", help="default: 8")
    cluster.add_argument("--cpu-cores", type=positive, default=128, metavar="N", help="in all (default: 128)")
    cluster.add_argument(
        "--bandwidth", type=positive, default=25e9, metavar="N", help="bytes/s a node (default: 25GB/s)"
    )
    cluster.add_argument("--rates", metavar="FILE", help="rates of your GPU (or core), by benchmarks.stages")
    prices = result.add_argument_group("prices, in dollars")
    prices.add_argument("--gpu-hour-price", type=number, metavar="N", help="default: an example, by the kind of GPU")
    prices.add_argument("--cpu-core-hour-price", type=number, default=0.04, metavar="N", help="default: 0.04")
    prices.add_argument("--storage-price", type=number, default=23.0, metavar="N", help="TB and month (default: 23)")
    prices.add_argument("--network-price", type=number, default=0.0, metavar="N", help="TB read or sent (default: 0)")
    serving = result.add_argument_group("serving")
    serving.add_argument("--requests-per-hour", type=number, default=0.0, metavar="N", help="videos (default: 0, none)")
    serving.add_argument("--segments", type=whole, default=4, metavar="N", help="of a video (default: 4)")
    serving.add_argument("--busy", type=number, default=BUSY, metavar="SHARE", help=f"of the time (default: {BUSY})")
    result.add_argument("--memory", action="store_true", help="what fits into GPUs: training by ZeRO stage, inference")
    result.add_argument("--json", action="store_true", help="the same as JSON")
    _without_output(result)
    return result


def _without_output(result: argparse.ArgumentParser) -> None:
    """This job writes nothing."""
    output = next(action for action in result._actions if action.dest == "output")
    output.help = argparse.SUPPRESS


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The cluster that the flags describe. Raises InputError."""
    gpu: Hardware = GPUS[arguments.gpu] if arguments.gpus else CPU
    if arguments.rates:
        try:
            gpu = with_rates(gpu, existing(arguments.rates, "--rates"))
        except ValueError as error:
            raise InputError(f"--rates {error}") from None
    if not arguments.gpus_per_node:
        raise InputError("--gpus-per-node 0: expected at least 1")
    price = gpu.hour_price if arguments.gpu_hour_price is None else arguments.gpu_hour_price
    prices = Prices(price, arguments.cpu_core_hour_price, arguments.storage_price, arguments.network_price)
    return Cluster(
        arguments.gpus, gpu, max(1, int(arguments.cpu_cores)), prices, arguments.bandwidth, arguments.gpus_per_node
    )


def stages_of(config: Config, arguments: argparse.Namespace, cluster: Cluster) -> list[StagePlan]:
    """Preprocessing, tokens and every training. Raises InputError for videos that give no clips."""
    height, width = arguments.source_size
    videos = Videos(
        arguments.videos, arguments.seconds_per_video, height, width, arguments.source_fps, arguments.source_bits
    )
    try:
        rows = rows_of(config, videos)
    except ValueError as error:
        raise InputError(f"--seconds-per-video: {error}") from None
    planned = [plan_preprocess(config, videos, cluster), plan_tokens(config, videos, cluster)]
    trained = trained_stages(config)
    return planned + [plan_training(config, stage, rows, cluster, arguments.epochs) for stage in trained]


def served(config: Config, arguments: argparse.Namespace, cluster: Cluster) -> ServingPlan | None:
    """The deployments. Raises InputError for a length or a share that cannot be."""
    if not arguments.requests_per_hour:
        return None
    if arguments.segments < 1:
        raise InputError(f"--segments {arguments.segments}: expected at least 1")
    if not 0 < arguments.busy < 1:
        raise InputError(f"--busy {arguments.busy:g}: expected a share above 0 and below 1")
    return plan_serving(config, cluster.gpu, arguments.requests_per_hour, arguments.segments, arguments.busy)


def report(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is told."""
    cluster = cluster_of(arguments)
    stages, serving = stages_of(config, arguments, cluster), served(config, arguments, cluster)
    stored = sum(stage.stored_bytes for stage in stages)
    slowest = max(stages, key=lambda stage: stage.hours)
    found: dict[str, Any] = {
        "config": config.name,
        "cluster": {"gpus": cluster.gpus, "gpu": cluster.gpu.name, "cpu_cores": cluster.cpu_cores},
        "stages": [asdict(stage) for stage in stages],
        "hours": sum(stage.hours for stage in stages),
        "gpu_hours": sum(stage.gpu_hours for stage in stages),
        "network_bytes": sum(stage.network_bytes for stage in stages),
        "stored_bytes": stored,
        "money": sum(stage.money for stage in stages),
        "storage_money_a_month": stored / 1e12 * cluster.prices.stored_tb_month,
        "bottleneck": f"{slowest.name}: {slowest.bottleneck}",
    }
    if serving is not None:
        devices = sum(serving.replicas)
        price = cluster.prices.gpu_hour if cluster.gpus else cluster.prices.cpu_core_hour
        found["serving"] = {
            **asdict(serving), "seconds": serving.seconds._asdict(), "money_a_month": devices * price * HOURS_A_MONTH,
        }  # fmt: skip
    if arguments.memory:
        found["memory"] = memory_tables(config, cluster)
    return found


def main() -> None:
    """Plan and print."""
    arguments = flags().parse_args()
    config = read_config(arguments)
    found = report(config, arguments)
    print(json.dumps(found, indent=2)) if arguments.json else print_plan(found)


if __name__ == "__main__":
    run(main)
