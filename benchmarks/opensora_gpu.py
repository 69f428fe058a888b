"""STDiT3-XL/2 with random weights: load time, memory and seconds a denoising step; neither Ray nor data.

`python -m benchmarks.opensora_gpu` on a GPU; `--depth 2 --hidden-size 64 --device cpu` shows that it works without one.
A step is one pass with text guidance (a batch of two), as a sampler makes it. Sizes are Open-Sora v1.2's own names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arlon_ray.artifact import WEIGHTS, record
from arlon_ray.config import DitConfig, InjectionConfig
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.dit import STDiT3, load_dit
from benchmarks.machine import machine, peak_memory_mib, synchronised, timed

#: name: (height, width in pixels, latent frames)
CASES = {"240p, 51 frames": (240, 426, 15), "720p, 68 frames": (720, 1280, 20)}


def write_random(config: DitConfig, folder: Path) -> int:
    """An artefact of random weights in bfloat16; returns its bytes."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in STDiT3(config).state_dict().items()}
    save_file({name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in shapes.items()}, folder / WEIGHTS)
    record(folder, kind="dit", config=config.model_dump(mode="json"))
    return (folder / WEIGHTS).stat().st_size


@torch.no_grad()
def bench_step(dit: STDiT3, size: tuple[int, int], frames: int, device: str, guided: bool, runs: int) -> dict[str, Any]:
    """Seconds to prepare a segment and seconds of one step, and the peak of GPU memory."""
    shape = (frames, size[0] // 8, size[1] // 8)
    text = torch.randn(1, dit.config.model_max_length, dit.config.caption_channels, device=device)
    mask = torch.ones(1, dit.config.model_max_length, dtype=torch.bool, device=device)
    x = torch.randn(1, dit.config.in_channels, *shape, device=device)
    coarse = torch.randn_like(x) if guided else None
    options = GenerationOptions(guidance_scale=7.0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def prepare() -> Any:
        return guided_velocity(dit, shape, (text, mask), coarse, None, 24.0, size, options)

    velocity = prepare()
    moment = torch.full((1,), 500.0, device=device)
    result = {
        "tokens": shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2),
        "prepare_s": timed(synchronised(prepare, device), runs)["median"],
        "step_s": timed(synchronised(lambda: velocity(x, moment), device), runs),
    }
    if device == "cuda":
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    flags.add_argument("--depth", type=int, default=28)
    flags.add_argument("--hidden-size", type=int, default=1152)
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    flags.add_argument("--output", metavar="FILE", help="write the JSON there as well")
    arguments = flags.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; --device cpu with a small --depth shows that it works", file=sys.stderr)
        raise SystemExit(2)
    config = DitConfig(
        depth=arguments.depth, hidden_size=arguments.hidden_size, injection=InjectionConfig(enabled=True, width=512)
    )
    with tempfile.TemporaryDirectory() as folder:
        size = write_random(config, Path(folder))
        synchronised(lambda: None, arguments.device)()  # the device's own start is not part of it
        begin = time.perf_counter()
        dit = load_dit(folder, arguments.device, torch.bfloat16)
        synchronised(lambda: None, arguments.device)()
        load_s = time.perf_counter() - begin
    result: dict[str, Any] = {
        "machine": machine(),
        "parameters": sum(parameter.numel() for parameter in dit.parameters()),
        "file_gib": size / 2**30,
        "load_s": load_s,  # sha256 of the file included
        "cases": {},
    }
    if arguments.device == "cuda":
        result["weights_gpu_gib"] = torch.cuda.memory_allocated() / 2**30
    for name in arguments.cases:
        height, width, frames = CASES[name]
        result["cases"][name] = case = {}
        for kind in ("text-only", "guided"):
            try:
                case[kind] = bench_step(
                    dit, (height, width), frames, arguments.device, kind == "guided", arguments.runs
                )
            except torch.cuda.OutOfMemoryError:
                case[kind] = {"error": "out of memory"}
                torch.cuda.empty_cache()
    result["peak_memory_mib"] = peak_memory_mib()
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
