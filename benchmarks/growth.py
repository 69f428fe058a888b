"""What videos cost as they grow: seconds against length, resolution and batch, and the straight line through them.

`python -m benchmarks.growth --bundle weights/tiny` makes whole videos of 1 to 40 segments in this process, renders a
segment of a DiT of the bundle's sizes at growing resolutions, and segments of several requests together. A figure is
the median over rounds in which all sizes take turns. `per_unit` is what one more costs, `r2` how straight the line is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_FRAMES
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.generation.batching import Batch
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.rendering import Denoising, DenoisingBatch
from benchmarks.machine import in_turns, machine, tell
from jobs.command_line import InputError, existing, run

PROMPT = "a red circle moves to the right"
SEGMENTS, PIXELS, BATCHES = (1, 2, 4, 10, 20, 40), (32, 64, 96, 128), (1, 2, 4, 8)


def line(sizes: list[float], seconds: list[float]) -> dict[str, float]:
    """Least squares through (size, seconds): what one more costs, what remains without any, and how straight it is."""
    slope, rest = np.polyfit(sizes, seconds, 1)
    spread = float(np.var(seconds))
    error = float(np.mean((np.polyval([slope, rest], sizes) - seconds) ** 2))
    return {"per_unit_s": float(slope), "fixed_s": float(rest), "r2": 1 - error / spread if spread else 1.0}


def measured(works: Mapping[float, Callable[[], Any]], runs: int) -> dict[str, Any]:
    """Medians against sizes, from where to where they go, and the line through the medians."""
    found = in_turns({f"{size:g}": work for size, work in works.items()}, runs)
    seconds = {name: value["median"] for name, value in found.items()}
    spread = {name: [value["min"], value["max"]] for name, value in found.items()}
    return {"seconds": seconds, "spread": spread, **line(list(works), list(seconds.values()))}


def of_length(bundle: Bundle, segments: list[int], runs: int) -> dict[str, Any]:
    """Whole videos."""
    generator, options = VideoGenerator(bundle), default_options(bundle.config.sampling)

    def make(count: int) -> None:
        frames = sum(len(part) for part in generator.generate([PROMPT] * count, 0, options))
        assert frames == bundle.config.segment.groups_of(count) * GROUP_FRAMES, f"{frames} frames of {count} segments"

    return measured({count: partial(make, count) for count in segments}, runs)


@torch.no_grad()
def of_resolution(bundle: Bundle, pixels: list[int], runs: int) -> dict[str, Any]:
    """One denoising step of a segment; sizes are the tokens of its latent."""
    options = default_options(bundle.config.sampling)
    text = bundle.text.encode([PROMPT])
    works: dict[float, Callable[[], Any]] = {}
    for side in pixels:
        shape = (bundle.config.segment.latents, side // 8, side // 8)
        field = guided_velocity(
            bundle.dit, shape, text, _coarse(bundle, shape), None, bundle.config.video.fps, (side, side), options
        )
        x = torch.randn(1, bundle.dit.config.in_channels, *shape, device=bundle.device)
        works[bundle.dit.token_count(shape)] = partial(field, x, x.new_full((1,), 500.0))
    return measured(works, runs)


def _coarse(bundle: Bundle, shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(1, bundle.dit.config.in_channels, *shape, device=bundle.device)


def of_batch(bundle: Bundle, sizes: list[int], runs: int) -> dict[str, Any]:
    """One segment for each of so many requests, in one batch."""
    generator, options = VideoGenerator(bundle), default_options(bundle.config.sampling)
    assert generator.planner is not None
    tokens = next(generator.planner.plan([PROMPT], 0, options)).tokens

    def render(count: int) -> None:
        batch: Batch[Denoising] = DenoisingBatch(count)
        for seed in range(count):
            batch.join(_request(generator, tokens, seed, options))
        left = count
        while left:
            left -= len(batch.step())

    return measured({count: partial(render, count) for count in sizes}, runs)


def _request(generator: VideoGenerator, tokens: np.ndarray, seed: int, options: GenerationOptions) -> Denoising:
    return next(generator.renderer.rendering(PROMPT, tokens, None, seed, 0, options))


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--bundle", required=True, metavar="DIR")
    flags.add_argument("--segments", type=int, nargs="+", default=list(SEGMENTS))
    flags.add_argument("--pixels", type=int, nargs="+", default=list(PIXELS))
    flags.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    flags.add_argument("--runs", type=int, default=3)
    flags.add_argument("--output", type=Path, metavar="FILE")
    arguments = flags.parse_args()
    bundle = load_bundle(existing(arguments.bundle, "--bundle"))
    if not bundle.guided:
        raise InputError(f"--bundle {bundle.path}: is text-only; expected a guided one")
    found = {
        "machine": machine(),
        "config": bundle.config.name,
        "segments": of_length(bundle, arguments.segments, arguments.runs),
        "tokens": of_resolution(bundle, arguments.pixels, arguments.runs),
        "batch": of_batch(bundle, arguments.batches, arguments.runs),
    }
    tell(found, arguments.output)


if __name__ == "__main__":
    run(main)
