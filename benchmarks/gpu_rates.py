"""The rates of an H100, from what `benchmarks.gpu` and `benchmarks.ar_decoding` measured on one.

`python -m benchmarks.gpu_rates --output benchmarks/results/stages_h100.json` writes them as `benchmarks.stages` does.
Blocks that are computed again in the backward pass count as one more forward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from arlon_ray.config import ArConfig
from arlon_ray.planning.counts import TRAINING, Work, ar_steps, dit_forward
from arlon_ray.planning.rates import fit
from benchmarks.ar_decoding import BLOCKS, TEXT_TOKENS
from benchmarks.ar_decoding import SIZES as AR_SIZES
from benchmarks.gpu import SIZES
from benchmarks.gpu_sampling import xl2
from benchmarks.machine import tell
from jobs.command_line import InputError, existing, run

#: name, work, seconds, whether the fit does not see it
Row = tuple[str, Work, float, bool]
SMALL_TOKENS, BIG_TOKENS = 1024, 512
WAYS = {
    "ours": ((1, 1), 1),
    "ours, guided": ((1, 1), 2),
    **{f"ours, {name}": (size, 1) for name, size in BLOCKS.items()},
}
HELD_OUT = {("1b", f"ours, {name}") for name in BLOCKS}


def ar(cases: dict[str, Any]) -> list[Row]:
    """Sequences of two sizes of the AR, token by token, guided, and in blocks."""
    big = {name: its["seconds"]["median"] for name, its in cases["ar 1b, 512 tokens"]["cases"][0]["works"].items()}
    small = cases["ar small, batch 1, 1024 tokens, one run each after the first"]["seconds"]
    return [
        (f"{size}, {name}", _sequence(size, block, tokens, rows), seconds[name], (size, name) in HELD_OUT)
        for size, tokens, seconds in (("1b", BIG_TOKENS, big), ("small", SMALL_TOKENS, small))
        for name, (block, rows) in WAYS.items()
    ]


def _sequence(size: str, block: tuple[int, int], tokens: int, rows: int) -> Work:
    settings, codes = AR_SIZES[size]
    return ar_steps(ArConfig(**settings, block=block), codes, TEXT_TOKENS + 1, tokens // prod(block), rows).all


def trained(cases: dict[str, Any], how: str) -> list[Row]:
    """Forward and backward of STDiT3-XL/2; what was measured at 720p is held out."""
    rows = []
    for name, case in cases.items():
        if name.startswith("training") and how in name and "second machine" not in name:
            flops = case["tflop"] * 1e12 * (1 + case["recomputed_share"] / TRAINING)
            rows.append((name, Work(products=flops), case["step_s"]["median"], "720p" in name))
    return rows


def sampled(cases: dict[str, Any]) -> list[Row]:
    """A step guided by text: two rows of a third of the longest caption (`benchmarks.gpu_sampling`)."""
    dit, (height, width, groups) = xl2(False), SIZES["240p"]
    places = -(-height // 16) * -(-width // 16)
    work = dit_forward(dit, groups * 5, places, dit.model_max_length // 3, 2)
    return [("240p", Work(products=work.flops), cases["sampling, 240p"]["step_s"]["ours"]["median"], False)]


def told(rows: Sequence[Row]) -> dict[str, Any]:
    """The rates and what they say of every row."""
    seen = [row for row in rows if not row[3]]
    rate = fit([work for _, work, _, _ in seen], [seconds for _, _, seconds, _ in seen])
    cases = [
        {
            "case": name,
            "held_out": held_out,
            **asdict(work),
            "seconds": seconds,
            "predicted": rate.seconds(work),
            "error": rate.seconds(work) / seconds - 1,
        }
        for name, work, seconds, held_out in rows
    ]
    return {"rate": asdict(rate), "cases": cases}


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--input", default="benchmarks/results/gpu_h100.json", metavar="FILE")
    flags.add_argument("--output", type=Path, metavar="FILE")
    arguments = flags.parse_args()
    try:
        found = json.loads(existing(arguments.input, "--input").read_text())
        cases = found["cases"]
        stages = {
            "ar": told(ar(cases)),
            "dit": told(sampled(cases)),
            "train": told(trained(cases, "bf16, plain")),
            "train_compiled": told(trained(cases, "bf16, compiled")),
        }
    except (ValueError, KeyError) as error:
        raise InputError(f"--input {arguments.input}: not what benchmarks.gpu wrote: {error!r}") from None
    tell({"device": "cuda", "machine": found["machine"], "stages": stages}, arguments.output)


if __name__ == "__main__":
    run(main)
