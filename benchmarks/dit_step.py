"""A denoising step, and the sampling of one segment, beside Open-Sora v1.2's formulas written plainly, on a CPU.

`python -m benchmarks.dit_step --output FILE` (the weights in the box, and `small` with random ones; on a GPU
STDiT3-XL/2 is compared by `benchmarks.gpu`). Both have the same weights, the same guidance and the same overlap
of given frames; with random weights their velocities must agree to `TOLERANCE`, else it fails. A sampled segment is
everything from text features and coarse latent to clean latents: what ours prepares is in it. Works take turns. Where
the CPU has bfloat16 they are measured in it too: the plain model in it throughout, ours with its products, as
`precision: bf16` has it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from arlon_ray.config import Config, load_config
from arlon_ray.diffusion.rectified_flow import schedule, time_ratio
from arlon_ray.diffusion.solvers import sample_flow
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import GenerationOptions
from arlon_ray.models.dit import STDiT3, load_dit
from arlon_ray.models.quantised import in_bf16
from arlon_ray.precision import falls_back
from benchmarks.machine import in_turns, machine
from benchmarks.plain_opensora import guided_step

#: Largest difference of two velocities, over the largest velocity.
TOLERANCE = 1e-4
#: Real tokens of a caption, of those that the encoder pads to.
CAPTION = 10
#: name: (weights or None for random ones, steps of a sampled segment, runs).
SIZES: dict[str, tuple[str | None, int, int]] = {"tiny": ("weights/tiny/dit", 8, 15), "small": (None, 2, 3)}

Step = Callable[[Tensor, Tensor], Tensor]


class Comparison:
    """One size: both velocities of the same segment."""

    def __init__(self, config: Config, dit: STDiT3) -> None:
        self.config, self.dit, drawn = config, dit, torch.Generator().manual_seed(0)
        length, self.shape = config.text.max_tokens, (config.segment.latents, *config.latent_grid)
        self.size = (config.video.height, config.video.width)
        self.text = (
            torch.randn(1, length, config.text.dim, generator=drawn),
            torch.arange(length)[None] < min(CAPTION, length),
        )
        self.noise, self.coarse, given = torch.randn(3, 1, dit.config.in_channels, *self.shape, generator=drawn)
        self.noisy = torch.arange(self.shape[0])[None] >= config.segment.overlap_latents
        self.frozen = (self.noisy, given)
        self.options = GenerationOptions(guidance_scale=config.sampling.guidance_scale)

    def in_bf16(self) -> Comparison:
        """The plain model and all that it is given in bfloat16."""
        other = copy.copy(self)
        other.dit = copy.deepcopy(self.dit).bfloat16()
        other.dit.rope.freqs = self.dit.rope.freqs  # as `load_dit` has it
        (text, real), (noisy, given) = self.text, self.frozen
        other.text, other.frozen = (text.bfloat16(), real), (noisy, given.bfloat16())
        other.noise, other.coarse = self.noise.bfloat16(), self.coarse.bfloat16()
        return other

    def with_products_in_bf16(self) -> Comparison:
        """Ours as a CPU has it with `precision: bf16`."""
        other = copy.copy(self)
        other.dit = cast(STDiT3, in_bf16(copy.deepcopy(self.dit)))
        return other

    def ours(self) -> Step:
        """Everything that is constant is made here."""
        fps = self.config.video.fps
        return guided_velocity(
            self.dit, self.shape, self.text, self.coarse, self.noisy, fps, self.size, self.options
        )  # fmt: skip

    def plain(self, x: Tensor, time: Tensor) -> Tensor:
        """Everything is made at every step."""
        fps, scale = self.config.video.fps, self.options.guidance_scale
        return guided_step(self.dit, x, time, self.text, fps, self.size, scale, self.noisy, self.coarse)

    def sampled(self, step: Step, steps: int) -> Tensor:
        """A segment's latents."""
        dit = self.config.dit
        ratio = time_ratio(*self.size, self.shape[0], dit.time_base_pixels) * dit.time_scale
        return sample_flow(step, self.noise, schedule(steps, ratio), self.frozen)

    def difference(self) -> float:
        """How far the two are from each other: ‖ours − plain‖ / ‖plain‖."""
        time = torch.tensor([700.0])
        return float(_apart(self.ours()(self.noise, time), self.plain(self.noise, time)))


def _apart(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).norm() / other.norm()


@torch.no_grad()
def random_dit(config: Config) -> STDiT3:
    """Random weights everywhere: outputs that begin at zero would hide differences."""
    torch.manual_seed(0)
    dit = STDiT3(config.dit).eval().requires_grad_(False)
    for name, parameter in dit.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.normal_(0, 0.02)
    return dit


def measured(size: str, steps: int, runs: int, overrides: list[str] | None = None) -> dict[str, Any]:
    """Seconds of a step and of a segment of `steps` steps. Raises AssertionError where the two differ."""
    config, weights = load_config(size, overrides or []), SIZES[size][0]
    plainly_random, time = Comparison(config, random_dit(config)), torch.tensor([700.0])
    # not of trained weights: on noise they amplify rounding, at some places a thousandfold, whatever is computed
    difference = plainly_random.difference()
    assert difference < TOLERANCE, f"{size}: the velocities differ by {difference:.2e} of their size"
    comparison = Comparison(config, load_dit(weights)) if weights and not overrides else plainly_random
    velocity = comparison.ours()
    step: dict[str, Callable[[], Any]] = {
        "plain": lambda: comparison.plain(comparison.noise, time),
        "ours": lambda: velocity(comparison.noise, time),
    }
    segment: dict[str, Callable[[], Any]] = {
        "plain": lambda: comparison.sampled(comparison.plain, steps),
        "ours": lambda: comparison.sampled(comparison.ours(), steps),
    }
    rounded = {}
    if not falls_back("bf16", "cpu"):
        plain, ours = comparison.in_bf16(), comparison.with_products_in_bf16()
        half = ours.ours()
        rounded = {"relative_difference_bf16": float(_apart(half(ours.noise, time), velocity(comparison.noise, time)))}
        step |= {"plain, bf16": lambda: plain.plain(plain.noise, time), "ours, bf16": lambda: half(ours.noise, time)}
        segment |= {
            "plain, bf16": lambda: plain.sampled(plain.plain, steps),
            "ours, bf16": lambda: ours.sampled(ours.ours(), steps),
        }
    return {
        "parameters": sum(parameter.numel() for parameter in comparison.dit.parameters()),
        "tokens": comparison.dit.token_count(comparison.shape),
        "relative_difference": difference,
        **rounded,
        "step_s": in_turns(step, runs),
        "steps_of_a_segment": steps,
        "segment_s": in_turns(segment, runs),
    }


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    flags.add_argument("--steps", type=int, help="of a sampled segment (default: by size)")
    flags.add_argument("--runs", type=int, help="of each (default: by size)")
    flags.add_argument("--output", metavar="FILE", help="write the JSON there, after every size")
    arguments = flags.parse_args()
    result: dict[str, Any] = {"machine": machine(), "tolerance": TOLERANCE, "sizes": {}}
    for size in arguments.sizes:
        _, steps, runs = SIZES[size]
        found = result["sizes"][size] = measured(size, arguments.steps or steps, arguments.runs or runs)
        if arguments.output:
            Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")
        for what in ("step_s", "segment_s"):
            for name, its in found[what].items():
                print(
                    f"{size} {what}: {name} {its['median']:.4f}: "
                    f"{its['times_as_fast']:.2f} times as fast ({its['from']:.2f}–{its['to']:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
