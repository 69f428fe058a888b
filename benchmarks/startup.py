"""How long a start takes: importing, opening a bundle until it is ready to serve, and loading STDiT3-XL/2.

`python -m benchmarks.startup --output FILE`

Every figure is of new processes, which take turns. *import*: `import torch` alone, then with `arlon_ray`, and with all
that makes videos. *ready*: from behind `import torch` until every part of the bundle is loaded (VAE, codec, AR, DiT,
text encoder), with the time of each. *xl2*: an artefact of random weights in bf16 on the local disk (in its cache: it
has just been written) until the model is there, its sha256 checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_sampling import write_random, xl2
from benchmarks.machine import machine, tell

#: What begins every process: seconds since `import torch` was done are told at its end.
_BEGIN = "import time; start = time.perf_counter(); import torch; torch_s = time.perf_counter() - start; "
_TELL = "import json; print(json.dumps({'torch': torch_s, **found}))"
IMPORTS = {
    "arlon_ray": _BEGIN
    + "import arlon_ray; found = {'arlon_ray': time.perf_counter() - start - torch_s}; "
    + "import arlon_ray.generation; found['generation'] = time.perf_counter() - start - torch_s; "
    + _TELL
}


def ready(bundle: Path) -> str:
    """A process that loads all of a bundle."""
    return (
        f"{_BEGIN}from arlon_ray.bundle import load_bundle; from arlon_ray.generation import VideoGenerator\n"
        "found = {}\n"
        "def done(name, since):\n    found[name] = time.perf_counter() - since\n"
        "begin = time.perf_counter(); done('imports', start + torch_s)\n"
        f"bundle = load_bundle({str(bundle)!r}); done('open', begin)\n"
        "for name in ('vae', 'codec', 'ar', 'dit', 'text'):\n"
        "    since = time.perf_counter(); getattr(bundle, name); done(name, since)\n"
        f"VideoGenerator(bundle); done('ready', start + torch_s)\n{_TELL}"
    )


def loads(artefact: Path) -> str:
    """A process that loads one DiT in bf16."""
    return (
        f"{_BEGIN}from arlon_ray.models.dit import load_dit; begin = time.perf_counter(); "
        f"dit = load_dit({str(artefact)!r}, 'cpu', torch.bfloat16); found = {{'load': time.perf_counter() - begin, "
        f"'parameters': sum(p.numel() for p in dit.parameters())}}; {_TELL}"
    )


def in_new_processes(codes: Mapping[str, str], runs: int) -> dict[str, Any]:
    """Medians, smallest and largest of what each process tells; the first round warms the disk's cache up."""
    told: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for _ in range(runs + 1):
        for name, code in codes.items():
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            told[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {
            part: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for part in rounds[0]
            for values in [[each[part] for each in rounds[1:]]]
        }
        for name, rounds in told.items()
    }


def measured(bundle: Path, runs: int, depth: int) -> dict[str, Any]:
    """Seconds of all parts. `depth`: layers of STDiT3-XL/2 (28 are all of it)."""
    config = xl2(small=False).model_copy(update={"depth": depth})
    with tempfile.TemporaryDirectory() as folder:
        size = write_random(config, Path(folder))
        codes = {**IMPORTS, "ready": ready(bundle), "xl2": loads(Path(folder))}
        found = in_new_processes(codes, runs)
    return {"bundle": bundle.name, "xl2_depth": depth, "xl2_file_gib": size / 2**30, "seconds": found}


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--bundle", default="weights/tiny", metavar="DIR")
    flags.add_argument("--depth", type=int, default=28, help="layers of STDiT3-XL/2; fewer where memory is short")
    flags.add_argument("--runs", type=int, default=3)
    flags.add_argument("--output", metavar="FILE")
    arguments = flags.parse_args()
    result = {"machine": machine(), **measured(Path(arguments.bundle).resolve(), arguments.runs, arguments.depth)}
    tell(result, arguments.output)


if __name__ == "__main__":
    main()
