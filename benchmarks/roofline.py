"""What each part reaches, beside what the machine can: a roofline (Williams, Waterman & Patterson 2009) as a picture.

`python -m benchmarks.roofline --output docs/performance/roofline.png`

A part stands at its operations a byte, and reaches so many operations a second; above it is the roof: memory on the
left, arithmetic on the right. Operations are counted from the configuration (`arlon_ray.planning.counts`). Bytes are
the fewest that have to pass: weights once, what goes in and comes out, and the keys and values that the AR looks at;
what a processor's caches hold need not come from the memory, so small parts may lie above its slope. The CPU's parts
(float32, random weights) are measured here on one thread, by the time of that thread, the best of several runs: others
that compute meanwhile count little. The GPU's (bf16) come from `gpu_h100.json`, and its data sheet is drawn too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, ArConfig, Config, DitConfig, load_config
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.models.vae import build_vae
from arlon_ray.planning import counts
from benchmarks.ar_decoding import SIDE, SIZES, TEXT_DIM, TEXT_TOKENS, build
from benchmarks.dit_step import CAPTION, Comparison, random_dit
from benchmarks.gpu import SIZES as GPU_SIZES
from benchmarks.gpu_sampling import xl2
from benchmarks.machine import machine

RESULTS = Path(__file__).with_name("results")
FLOAT32, BF16 = 4, 2
#: Bytes a second of an H100's memory by its data sheet (SXM5, HBM3).
H100_BYTES_PER_S = 3.35e12


@dataclass(frozen=True)
class Point:
    """A part: operations, the fewest bytes, and seconds of one piece of its work."""

    name: str
    flops: float
    moved: float
    seconds: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.moved

    @property
    def reached(self) -> float:
        """Operations a second."""
        return self.flops / self.seconds


@dataclass(frozen=True)
class Roof:
    """Operations and bytes a second."""

    name: str
    flops_per_s: float
    bytes_per_s: float

    def at(self, intensity: float) -> float:
        """The most operations a second at so many a byte."""
        return min(self.flops_per_s, intensity * self.bytes_per_s)


def cpu_roof(side: int = 512, mib: int = 64, runs: int = 100) -> Roof:
    """Products of float32 matrices and copies on one thread, the best of `runs`."""
    a, b = torch.randn(2, side, side)
    source = torch.ones(mib * 2**18)
    target = torch.empty_like(source)
    product, copy = best(lambda: a @ b, runs), best(lambda: target.copy_(source), runs)
    return Roof("measured", 2 * side**3 / product, 2 * source.nbytes / copy)


def best(work: Callable[[], Any], runs: int) -> float:
    """This thread's seconds of the fastest of so many runs, behind one to warm up."""
    work()
    seconds = []
    for _ in range(runs):
        begin = time.thread_time()
        work()
        seconds.append(time.thread_time() - begin)
    return min(seconds)


def ar_step(name: str, size: str, rows: int, tokens: int, seconds: float, number: int) -> Point:
    """One token of each of `rows` sequences, in the middle of `tokens`; `number`: bytes of a number."""
    settings, codes = SIZES[size]
    ar, seen = ArConfig(**settings), TEXT_TOKENS + tokens / 2
    work = (counts.ar_trunk(ar, 1, seen) + counts.ar_head(ar, codes, 1)) * rows
    weights = ar.layers * (4 * ar.dim**2 + 3 * ar.dim * counts.ar_hidden(ar)) + codes * ar.dim
    return Point(name, work.flops, number * (weights + rows * seen * 2 * ar.layers * ar.dim), seconds)


def dit_step(
    name: str, dit: DitConfig, frames: int, places: int, text: int, rows: int, seconds: float, number: int
) -> Point:  # fmt: skip
    """One guided evaluation of `rows` branches over `frames`×`places` tokens."""
    work = counts.dit_forward(dit, frames, places, text, rows)
    # pairs of a spatial and a temporal block: attention, cross-attention (its keys and values are prepared), MLP
    width, hidden = dit.hidden_size, int(dit.hidden_size * dit.mlp_ratio)
    weights = 2 * dit.depth * (6 * width**2 + 2 * width * hidden)
    ends = 2 * frames * places * dit.in_channels * 4
    return Point(name, work.flops, number * (weights + ends), seconds)


def vae_point(name: str, config: Config, encode: bool, groups: int, seconds: float) -> Point:
    """So many groups of 17 frames, coded in float32."""
    with torch.device("meta"):
        vae = build_vae(config.vae)
    half = [parameter for name, parameter in vae.named_parameters() if name.startswith("encode") is encode]
    frames = 3 * GROUP_FRAMES * config.video.height * config.video.width
    latents = config.vae.latent_channels * GROUP_LATENTS * config.latent_grid[0] * config.latent_grid[1]
    moved = sum(parameter.numel() for parameter in half) + groups * (frames + latents)
    return Point(name, counts.vae_group(config, encode).flops * groups, FLOAT32 * moved, seconds)


def cpu_points(sizes: Sequence[str], runs: int) -> Iterator[Point]:
    """The parts of presets, timed here with random weights: each is the best of `runs`."""
    for size in sizes:
        for batch in (1, 8):
            tokens = 2 * SIDE**2
            seconds = min(ar_steps(size, batch, tokens))
            yield ar_step(f"AR {size}, batch {batch}", size, batch, tokens, seconds, FLOAT32)
        config = load_config(size)
        comparison = Comparison(config, random_dit(config))
        velocity, moment = comparison.ours(), torch.tensor([700.0])
        seconds = best(partial(velocity, comparison.noise, moment), runs if size == "tiny" else 1)
        grid = counts.dit_grid(config, config.segment.groups)
        # two branches: text with and without
        yield dit_step(f"DiT {size}, a step", config.dit, *grid, CAPTION, 2, seconds, FLOAT32)
        yield from vae_points(size, config, 4 if size == "tiny" else 1, runs)


def ar_steps(size: str, batch: int, tokens: int) -> Iterator[float]:
    """Seconds of each step of `batch` sequences, behind the first few."""
    model, grid = build(size, (1, 1), "cpu", torch.float32, None), (tokens // SIDE**2, SIDE, SIDE)
    shared = SamplingBatch(model, TEXT_TOKENS + tokens, batch)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM), torch.ones(1, TEXT_TOKENS, dtype=torch.bool)
    options, none = GenerationOptions(ar_guidance_scale=1.0), torch.zeros(0, SIDE, SIDE, dtype=torch.long)
    for number in range(batch):
        shared.join(Sampling(text, none, grid, options, torch.Generator().manual_seed(number)))
    for number in range(tokens - 1):
        begin = time.thread_time()
        shared.step()
        if number >= tokens // 4:  # as far from the middle as what comes behind
            yield time.thread_time() - begin


def vae_points(size: str, config: Config, groups: int, runs: int) -> Iterator[Point]:
    """Both halves of the VAE."""
    vae = build_vae(config.vae).eval().requires_grad_(False)
    frames = torch.zeros(1, 3, groups * GROUP_FRAMES, config.video.height, config.video.width)
    latents = torch.zeros(1, config.vae.latent_channels, groups * GROUP_LATENTS, *config.latent_grid)
    works: dict[bool, Callable[[], Any]] = {True: lambda: vae.encode(frames), False: lambda: vae.decode(latents)}
    for encode, work in works.items():
        name = f"VAE {size}, {'encode' if encode else 'decode'}"
        yield vae_point(name, config, encode, groups, best(work, runs))


def gpu_points(gpu: dict[str, Any]) -> Iterator[Point]:
    """Of `benchmarks.gpu`, in bf16."""
    cases = gpu["cases"]
    one_b = next(case for case in cases["ar 1b, 512 tokens"]["cases"] if "works" in case)
    seconds = 1 / one_b["works"]["ours"]["tokens_per_s"]
    yield ar_step("AR 1 B, batch 1", "1b", 1, one_b["tokens"], seconds, BF16)
    small = cases["ar small, batch 1, 1024 tokens, one run each after the first"]["seconds"]["ours"]
    yield ar_step("AR small, batch 1", "small", 1, 1024, small / 1024, BF16)
    sampling, dit = cases["sampling, 240p"], xl2(small=False)
    height, width, groups = GPU_SIZES["240p"]
    frames, places = groups * GROUP_LATENTS, -(-height // 16) * -(-width // 16)
    assert frames * places == sampling["tokens"], "another resolution than gpu.json's"
    text = dit.model_max_length // 3  # as `benchmarks.gpu_sampling` has it
    for name, seconds in (
        ("DiT XL/2, 240p", sampling["step_s"]["ours"]["median"]),
        ("DiT XL/2, 240p, compiled", sampling["compiled"]["step_s"]["ours, compiled"]["median"]),
    ):
        yield dit_step(name, dit, frames, places, text, 2, seconds, BF16)


def draw(panels: list[tuple[str, list[Roof], list[Point]]], path: Path) -> None:
    """One panel a machine: the first roof is solid, others are dashed."""
    from matplotlib import use

    use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(7.2 * len(panels), 5.4), squeeze=False)
    for axis, (title, roofs, points) in zip(axes[0], panels, strict=True):
        low, high = (end(point.intensity for point in points) for end in (min, max))
        low, high = low / 3, max(high * 3, *(4 * roof.flops_per_s / roof.bytes_per_s for roof in roofs))
        for number, roof in enumerate(roofs):
            ridge = roof.flops_per_s / roof.bytes_per_s
            xs = [low, ridge, high]
            label = f"{roof.name}: {_short(roof.flops_per_s)}FLOP/s, {_short(roof.bytes_per_s)}B/s"
            axis.plot(xs, [roof.at(x) for x in xs], "k-" if not number else "k--", lw=1.6 if not number else 0.9,
                      label=label)  # fmt: skip
        for number, point in enumerate(points):
            share = point.reached / roofs[0].at(point.intensity)
            label = f"{point.name}: {_short(point.reached)}FLOP/s, {share:.0%}"
            axis.plot(point.intensity, point.reached, "osD^vP*X"[number % 8], ms=8, label=label)
        axis.set(xscale="log", yscale="log", title=title, xlabel="operations a byte (the fewest bytes)")
        axis.set_ylabel("operations a second")
        axis.grid(alpha=0.3, which="both", lw=0.4)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _short(value: float) -> str:
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / scale:.3g} {prefix}"


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--sizes",
        nargs="*",
        choices=("tiny", "small"),
        default=["tiny", "small"],
        help="presets measured on this CPU; none: the GPU's panel alone",
    )
    flags.add_argument("--runs", type=int, default=15, help="of each; the best one counts")
    flags.add_argument("--gpu", default=RESULTS / "gpu_h100.json", type=Path, metavar="FILE", help="of benchmarks.gpu")
    flags.add_argument("--output", required=True, type=Path, metavar="PNG")
    arguments = flags.parse_args()
    if not arguments.gpu.is_file():
        flags.error(f"--gpu {arguments.gpu}: there is no such file; python -m benchmarks.gpu writes one")
    gpu = json.loads(arguments.gpu.read_text())
    torch.set_num_threads(1)
    ceilings = gpu["cases"]["ceilings"]
    gpu_roofs = [
        Roof("measured", ceilings["matmul_tflops_per_s"] * 1e12, ceilings["copy_gb_per_s"] * 1e9),
        Roof("data sheet", ceilings["peak_tflops_per_s"] * 1e12, H100_BYTES_PER_S),
    ]
    panels = [(f"{gpu['machine']['gpu']}, bf16", gpu_roofs, [*gpu_points(gpu)])]
    if arguments.sizes:
        points = [*cpu_points(arguments.sizes, arguments.runs)]
        panels.insert(0, (f"{machine()['cpu']}, float32, one thread", [cpu_roof()], points))
    for title, its_roofs, points in panels:
        print(title, *(f"  {roof}" for roof in its_roofs), sep="\n")
        for point in points:
            share = point.reached / its_roofs[0].at(point.intensity)
            print(
                f"  {point.name}: {point.intensity:.3g} FLOP/B, {_short(point.reached)}FLOP/s, {share:.0%} of the roof"
            )
    draw(panels, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
