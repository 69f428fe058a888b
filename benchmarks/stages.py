"""What each stage takes on one device, as seconds an operation, a number and a call; and whether that predicts others.

`python -m benchmarks.stages --output benchmarks/results/stages_cpu.json` measures every stage at several sizes of
model, resolution and length, fits the four rates of `arlon_ray.planning.rates` to them, and predicts the sizes that the
fit has not seen. One thread; CPU seconds of this process, the least of rounds in which all sizes take turns, so that
what else the machine does counts little. Stages that are in FILE already and are not asked for stay there.
`jobs/plan.py --rates FILE` plans with what was found.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import torch

from arlon_ray.planning.rates import fit
from benchmarks.machine import device_or_exit, machine, synchronised, tell
from benchmarks.stage_cases import STAGES, Case, cases
from jobs.command_line import run

#: Work of at least so long is timed at once.
LEAST_S = 0.02


def measure(all_cases: list[Case], rounds: int, device: str) -> list[float]:
    """Seconds of each, the least over the rounds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    works = [synchronised(case.run, device) for case in all_cases]
    times, least = [1] * len(works), [float("inf")] * len(works)
    for number in range(rounds + 1):
        for i, work in enumerate(works):
            begin = clock()
            for _ in range(times[i]):
                work()
            seconds = (clock() - begin) / times[i]
            if number:  # the first one warms up, and says how often the others go
                least[i] = min(least[i], seconds)
            else:
                begin = clock()
                work()
                times[i] = max(1, round(LEAST_S / max(clock() - begin, 1e-6)))
    return least


def stage(name: str, folder: Path, rounds: int, device: str) -> dict[str, Any]:
    """Measurements of a stage, the rates that fit them, and what they say of every case."""
    all_cases = cases(name, folder, device)
    seconds = measure(all_cases, rounds, device)
    seen = [(case.work, its) for case, its in zip(all_cases, seconds, strict=True) if not case.held_out]
    rate = fit([work for work, _ in seen], [its for _, its in seen])
    rows = [
        {
            "case": case.name,
            "held_out": case.held_out,
            **asdict(case.work),
            "seconds": its,
            "predicted": rate.seconds(case.work),
            "error": rate.seconds(case.work) / its - 1,
        }
        for case, its in zip(all_cases, seconds, strict=True)
    ]
    return {"rate": asdict(rate), "cases": rows}


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--stages", nargs="+", default=list(STAGES), metavar="STAGE", help=", ".join(STAGES))
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    flags.add_argument("--output", type=Path, metavar="FILE")
    arguments = flags.parse_args()
    device_or_exit(arguments.device)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    found: dict[str, Any] = {"device": arguments.device, "machine": machine(), "stages": {}}
    if arguments.output and arguments.output.exists():
        found["stages"] = json.loads(arguments.output.read_text())["stages"]
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.stages:
            found["stages"][name] = stage(name, Path(folder), arguments.rounds, arguments.device)
    tell(found, arguments.output)


if __name__ == "__main__":
    run(main)
