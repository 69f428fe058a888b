"""What a GPU makes of it; needs torch and einops (and what arlon_ray itself imports), neither Ray nor data.

    python -m benchmarks.gpu --output DIR [--seconds 150] [--cases training sampling …]

Cases, in the order of their worth (a case that no time is left for is listed as skipped, one that fails with its error;
the JSON is written after each):

ceilings    the most that products of matrices and copies reach here
training    forward and backward of STDiT3-XL/2 in bf16: MFU at 240p and 720p, compiled or not, recomputed or not
sampling    a step with text and token guidance beside Open-Sora's formulas with the same weights, and its memory
videos      whole videos of `small` (157 M) and `opensora-v1.2` (1.2 B): text alone with 30 steps, AR-guided with 6
loading     STDiT3-XL/2 from an artefact
offload     memory and time of a video whose idle parts wait in the CPU's memory, beside all on the GPU
attention   torch's kernels at these sizes
ar          `benchmarks.ar_decoding`, in a process of its own

`--device cpu --small` shows that it works without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_attention import attention_kernels
from benchmarks.gpu_offload import offloaded
from benchmarks.gpu_sampling import loading, steps, whole_videos, xl2
from benchmarks.gpu_training import measured_ceilings, training_speed
from benchmarks.machine import device_or_exit, machine

#: name: (height, width in pixels, groups of 17 frames). 240p's 426 pixels are 424 here: 53 latents as well.
SIZES = {"240p": (240, 424, 3), "720p": (720, 1280, 3)}
SMALL_SIZES = {"240p": (48, 64, 2), "720p": (64, 80, 2)}
#: (weights, whether blocks are compiled, size), the most important first.
TRAININGS = [
    ("bf16", True, "240p"), ("bf16", True, "720p"), ("bf16", False, "240p"), ("autocast", True, "240p"),
    ("bf16", False, "720p"), ("autocast", True, "720p"),
]  # fmt: skip
CASES = ("ceilings", "training", "sampling", "videos", "loading", "offload", "attention", "ar")
#: What a case took on an H100, roughly, in seconds: it is not begun with less left.
LEAST_S = 8.0


class Report:
    """The JSON and the time that is left."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.file, self.end = folder / "gpu.json", time.monotonic() + seconds
        self.result: dict[str, Any] = {"machine": machine(), "cases": {}, "seconds": {}, "skipped": []}

    def left(self) -> float:
        """Seconds until the end of the budget."""
        return self.end - time.monotonic()

    def keep(self, name: str, value: Any) -> None:
        """Write what was found down, and say so."""
        self.result["cases"][name] = value
        self.file.write_text(json.dumps(self.result, indent=2) + "\n")
        print(f"{name}: {json.dumps(value)}"[:400], flush=True)

    def keep_part(self, name: str, variant: str, value: Any) -> None:
        """`keep` of one of several figures of a case."""
        self.keep(f"{name}, {variant}", value)

    def case(self, name: str, work: Callable[[], Any]) -> None:
        """Do one case; what it raises is its result."""
        if self.left() < LEAST_S:
            self.result["skipped"].append(name)
            return
        begin = time.monotonic()
        try:
            found = work()
            if found is not None:
                self.keep(name, found)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.keep(name, {"error": f"{type(error).__name__}: {str(error)[:600]}", "where": str(where)})
        self.result["seconds"][name] = round(time.monotonic() - begin, 1)


def training(report: Report, device: str, small: bool, most: int) -> None:
    """MFU of forward and backward, of the first `most` kinds."""
    sizes = SMALL_SIZES if small else SIZES
    for weights, compiled, size in TRAININGS[:most]:
        if small and compiled and size != "240p":
            continue  # a C++ compiler takes half a minute
        name = f"training, {size}, {weights}, {'compiled' if compiled else 'plain'}"
        dtype, runs = torch.bfloat16 if weights == "bf16" else torch.float32, 1 if small else 3
        keep = partial(report.keep_part, name)
        report.case(name, partial(training_speed, sizes[size], small, device, dtype, compiled, runs, keep))


def sampling(report: Report, device: str, small: bool) -> None:
    """Steps of ours and of Open-Sora's formulas."""
    for size, (height, width, groups) in (SMALL_SIZES if small else SIZES).items():
        runs = 1 if small else {"240p": 5, "720p": 2}[size]
        report.case(f"sampling, {size}", partial(steps, (height, width), 5 * groups, small, device, runs))


def videos(report: Report, device: str, small: bool) -> None:
    """End to end at `small` and at Open-Sora's size."""
    changes = ["video.height=64", "video.width=64", "dit.depth=1", "ar.layers=1"] if small else []
    few, many = (1, 2) if small else (6, 30)
    for preset, runs in (("small", 1),) if small else (("small", 3), ("opensora-v1.2", 1)):
        make = partial(whole_videos, preset, changes, 1 if small else 2, few, many, device, runs)
        report.case(f"videos, {preset}", make)


def autoregression(report: Report, device: str, small: bool) -> None:
    """AR decoding beside its peer, in a process of its own."""
    file = report.file.with_name("ar_decoding.json")
    sizes, tokens = (["tiny"], 64) if small else (["small", "1b"], 1024)

    def decode() -> Any:
        left = max(1.0, report.left())
        command = [
            sys.executable, "-m", "benchmarks.ar_decoding", "--device", device, "--sizes", *sizes, "--batch", "1", "8",
            "--tokens", str(tokens), "--seconds", str(int(left)), "--output", str(file),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 30)
        found = json.loads(file.read_text()) if file.exists() else {}
        return found if done.returncode == 0 else {**found, "error": done.stderr[-800:], "code": done.returncode}

    report.case("ar", decode)


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", metavar="DIR", required=True, help="gpu.json and ar_decoding.json are put there")
    flags.add_argument("--seconds", type=float, default=600, help="no case begins later than this")
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    flags.add_argument(
        "--trainings", type=int, default=len(TRAININGS), help="kinds of training, the most telling first"
    )
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    flags.add_argument("--small", action="store_true", help="two layers and few tokens")
    arguments = flags.parse_args()
    folder, small = Path(arguments.output), arguments.small
    device = device_or_exit(arguments.device, "--device cpu --small")
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, arguments.seconds)
    works: dict[str, Callable[[], None]] = {
        "ceilings": lambda: report.case("ceilings", lambda: measured_ceilings(device, small)),
        "training": lambda: training(report, device, small, arguments.trainings),
        "sampling": lambda: sampling(report, device, small),
        "videos": lambda: videos(report, device, small),
        "loading": lambda: report.case("loading", lambda: loading(xl2(small), device)),
        "offload": lambda: report.case("offload", lambda: offloaded(device, small)),
        "attention": lambda: report.case("attention", lambda: attention_kernels(device, small)),
        "ar": lambda: autoregression(report, device, small),
    }
    for name in (name for name in works if name in arguments.cases):
        works[name]()
    report.file.write_text(json.dumps(report.result, indent=2) + "\n")
    print(f"{report.file}: {len(report.result['cases'])} figures, skipped: {report.result['skipped'] or 'none'}")


if __name__ == "__main__":
    main()
