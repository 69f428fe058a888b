"""What `jobs/plan.py` prints, and its tables of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import indent
from typing import Any

from arlon_ray.config import Config, override
from arlon_ray.planning.memory import inference_memory, resident, served
from arlon_ray.planning.stages import Cluster, usable_workers
from arlon_ray.training.memory import PLANNED, activations_at_peak, plan_memory, training_of
from jobs.command_line import aligned

#: Bytes of the GPUs that the table of inference has columns for.
CARDS = {"8 GB": 8e9, "16 GB": 16e9, "24 GB": 24e9, "80 GB": 80e9}
#: Of a card's memory: the rest is the context of CUDA, its libraries' and fragments.
USABLE = 0.9
MOST_MICRO = 256


def memory_tables(config: Config, cluster: Cluster) -> dict[str, Any]:
    """What training needs by ZeRO stage, with the largest micro-batch that fits, and what inference needs."""
    return {
        "training": [
            row for stage in PLANNED if stage != "vae" or config.vae.train for row in _training(config, stage, cluster)
        ],
        "inference": [_inference(config, precision) for precision in ("fp32", "bf16", "int8")],
    }


def _training(config: Config, stage: str, cluster: Cluster) -> list[dict[str, Any]]:
    settings = training_of(config, stage)
    workers = usable_workers(settings, cluster.devices)
    section = f"vqvae.{stage.removeprefix('vqvae_')}" if stage.startswith("vqvae") else stage
    of_one = activations_at_peak(config, stage, 1)
    rows = []
    for zero in range(4):
        one = override(config, [
            f"{section}.training.{name}={value}"
            for name, value in {
                "zero_stage": zero, "batch_size": workers, "accumulation": 1, "compile": "false",
                "offload_optimizer": "false",
            }.items()
        ])  # fmt: skip
        plan = plan_memory(one, stage, workers, of_one)
        states, sample = plan.total - plan.activations, of_one[0]
        # where gradients have room, that of those which are not there yet at the peak is used
        room = USABLE * cluster.gpu.memory - states + max(0, sample - plan.activations)
        micro = max(0, min(MOST_MICRO, int(room / max(1, sample))))
        rows.append(
            {
                "stage": stage, "zero": zero, "workers": workers, "states": states, "of_a_sample": sample,
                "largest_micro_batch": micro,
            }
        )  # fmt: skip
    return rows


def _inference(config: Config, precision: Any) -> dict[str, Any]:
    parts = inference_memory(config, precision)
    together, apart = resident(parts, offloaded=False), resident(parts, offloaded=True)
    service, text_on_cpu = served(parts, config.serve), served(parts, config.serve, text_on_cpu=True)
    return {
        "precision": precision, "parts": {name: asdict(part) for name, part in parts.items()},
        "all": together, "idle_parts_offloaded": apart, "fits": _fits(together, apart, "offloaded"),
        "service": service, "service_text_on_cpu": text_on_cpu,
        "service_fits": _fits(sum(service.values()), sum(text_on_cpu.values()), "text on the CPU"),
    }  # fmt: skip


def _fits(whole: int, less: int, how: str) -> dict[str, str]:
    """Whether each card has room for `whole`, or for `less`, which is had in that way."""
    rooms = {card: USABLE * room for card, room in CARDS.items()}
    return {card: "yes" if whole <= room else how if less <= room else "no" for card, room in rooms.items()}


def print_plan(found: Mapping[str, Any]) -> None:
    """For people."""
    cluster = found["cluster"]
    devices = f"{cluster['gpus']} × {cluster['gpu']}, " if cluster["gpus"] else ""
    print(f"{found['config']} on {devices}{cluster['cpu_cores']} CPU cores\n")
    titles = ("stage", "hours", "GPU hours", "read and sent", "stored", "money", "held up by")
    rows = [
        (s["name"], hours(s["hours"]), hours(s["gpu_hours"]), size(s["network_bytes"]), size(s["stored_bytes"]),
         dollars(s["money"]), s["bottleneck"])
        for s in found["stages"]
    ]  # fmt: skip
    total = (
        "all, one after the other", hours(found["hours"]), hours(found["gpu_hours"]), size(found["network_bytes"]),
        size(found["stored_bytes"]), dollars(found["money"]), "",
    )  # fmt: skip
    print_table(titles, [*rows, total])
    for stage in found["stages"]:
        for note in stage["notes"]:
            print(f"  {stage['name']}: {note}")
    print(f"  what is stored costs {dollars(found['storage_money_a_month'])} a month")
    print(f"bottleneck: {found['bottleneck']}")
    if "serving" in found:
        _print_serving(found["serving"])
    if "memory" in found:
        _print_memory(found["memory"])


def _print_serving(serving: Mapping[str, Any]) -> None:
    print("\nserving")
    names = ("ar", "dit", "decoder")
    rows = [
        (name, f"{serving['seconds'][name]:.3g} s", str(count))
        for name, count in zip(names, serving["replicas"], strict=True)
    ]
    print_table(("deployment", "a segment", "replicas"), rows)
    print(
        f"  first segment after {serving['first_segment_s']:.1f} s, a video of {serving['shown_s']:.1f} s after "
        f"{serving['video_s']:.1f} s where nothing waits; {dollars(serving['money_a_month'])} a month"
    )
    print(f"bottleneck: {serving['bottleneck']}")


def _print_memory(memory: Mapping[str, Any]) -> None:
    print("\nmemory of a worker that trains")
    rows = [
        (r["stage"], str(r["zero"]), str(r["workers"]), size(r["states"]), size(r["of_a_sample"]),
         _micro(r["largest_micro_batch"]))
        for r in memory["training"]
    ]  # fmt: skip
    print_table(("stage", "ZeRO", "workers", "states", "a sample", "largest micro-batch"), rows)
    print("\nmemory of making videos (one at a time; `offloaded`: idle parts in main memory)")
    parts = list(memory["inference"][0]["parts"])
    rows = [
        (r["precision"], *(f"{size(r['parts'][p]['weights'])} + {size(r['parts'][p]['working'])}" for p in parts),
         size(r["all"]), size(r["idle_parts_offloaded"]), *r["fits"].values())
        for r in memory["inference"]
    ]  # fmt: skip
    print_table(("", *parts, "all", "offloaded", *CARDS), rows)
    print(
        "\nmemory of a service on one GPU, a replica of each deployment, whose batches are full (`serve.dit.max_batch`)"
    )
    rows = [
        (r["precision"], *(size(value) for value in r["service"].values()), size(sum(r["service"].values())),
         size(sum(r["service_text_on_cpu"].values())), *r["service_fits"].values())
        for r in memory["inference"]
    ]  # fmt: skip
    print_table(("", *memory["inference"][0]["service"], "all", "offload=text", *CARDS), rows)


def _micro(count: int) -> str:
    if not count:
        return "does not fit"
    return str(count) if count < MOST_MICRO else f"{MOST_MICRO} or more"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need."""
    print(indent(aligned([titles, *rows]), "  "))


def hours(value: float) -> str:
    """Hours, with as many digits as matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def dollars(value: float) -> str:
    """Whole dollars, or cents where there are few."""
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}"


def size(value: float) -> str:
    """Bytes in steps of a thousand."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} PB"
