"""Decoding latents to frames: group by group behind the rendering, and ours: in batches, beside the rendering.

`python -m benchmarks.vae_decode --bundle weights/tiny --output FILE`

*decode*: all latents of a few segments, at once (`vae.group_batch` groups of 17 frames at a time) and one group after
the other; in bfloat16 too, where the processor has it. *video*: the same segments rendered from one plan. In the loop a
segment is rendered, then its groups are decoded one by one; ours decodes a segment while the next is rendered
(`in_background`, as `VideoGenerator` does). What decoding adds to rendering alone is what a user waits for it.
*memory*: the process's peak after few and after many segments decoded as they come.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import GROUP_LATENTS
from arlon_ray.generation import ArPlanner, DiTRenderer, FrameDecoder, HandOver, default_options, segment_options
from arlon_ray.generation.overlapped import Threads, computing_with, in_background
from arlon_ray.models.vae import to_frames
from arlon_ray.precision import falls_back
from benchmarks.machine import device_or_exit, in_turns, machine, peak_memory_mib, tell

PROMPT = "a red circle moves to the right"


class Work:
    """One planned video of a bundle."""

    def __init__(self, bundle: Bundle, segments: int) -> None:
        self.bundle, self.segments = bundle, segments
        self.renderer, self.decoder = DiTRenderer(bundle), FrameDecoder(bundle)
        self.options = default_options(bundle.config.sampling, seam_frames=0)
        self.plans = [plan.tokens for plan in ArPlanner(bundle).plan([PROMPT] * segments, 0, self.options)]

    def rendered(self) -> Iterator[np.ndarray]:
        """New latents [C, n, h, w] of each segment."""
        handed, hand_over = None, HandOver.of(self.bundle.config, [PROMPT] * self.segments)
        for index, tokens in enumerate(self.plans):
            its = segment_options(self.options, [PROMPT] * self.segments, index)
            latents = self.renderer.render(PROMPT, tokens, handed, 0, index, its).latents
            handed = hand_over.after(handed, latents, index)
            yield latents

    def one_by_one(self, latents: np.ndarray) -> np.ndarray:
        """Each group decoded and turned into bytes by itself."""
        device, frames = self.bundle.device, []
        for start in range(0, latents.shape[1], GROUP_LATENTS):
            group = torch.from_numpy(latents[None, :, start : start + GROUP_LATENTS]).to(device)
            frames.append(to_frames(self.bundle.vae.decode(group))[0])
        return np.concatenate(frames)

    def loop(self) -> list[np.ndarray]:
        """Render, decode, render, decode."""
        return [self.one_by_one(latents) for latents in self.rendered()]

    def beside(self) -> list[np.ndarray]:
        """Decode one segment while the next is rendered."""
        threads = Threads.shared(self.decoder.bundle.device)
        with computing_with(threads.decoder):
            rendered = in_background(self.rendered(), 1, threads.dit)
            return [self.decoder.decode(latents) for latents in rendered]


def in_bf16(bundle: Bundle) -> Bundle:
    """The same with `vae.precision: bf16`."""
    other = load_bundle(bundle.path, bundle.device)
    vae = bundle.config.vae.model_copy(update={"precision": "bf16"})
    other.config = bundle.config.model_copy(update={"vae": vae})
    return other


def largest_difference(one: list[np.ndarray], other: list[np.ndarray]) -> int:
    """Of the pixels (0 to 255) of two videos."""
    pairs = zip(one, other, strict=True)
    return max(int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max()) for a, b in pairs)


def memory(work: Work, latents: np.ndarray, few: int, many: int) -> dict[str, float]:
    """Peaks of the process in MiB after so many segments, none of which is kept."""
    peaks = {}
    for number in range(1, many + 1):
        work.decoder.decode(latents)
        if number in (few, many):
            peaks[f"{number} segments"] = peak_memory_mib()
    return peaks


def measured(bundle: Bundle, segments: int, runs: int, many: int = 40) -> dict[str, Any]:
    """Seconds of both ways. Raises AssertionError if a pixel differs by more than the rounding of one."""
    work = Work(bundle, segments)
    parts = list(work.rendered())
    peaks = memory(work, parts[0], max(1, many // 10), many)
    difference = largest_difference(work.loop(), work.beside())
    assert difference <= 1, f"the two ways differ by {difference} of 255"
    latents = np.concatenate(parts, axis=1)
    decoding = {"loop": lambda: work.one_by_one(latents), "ours": lambda: work.decoder.decode(latents)}
    if not falls_back("bf16", bundle.device):
        half = FrameDecoder(in_bf16(bundle))
        decoding["ours, bf16"] = lambda: half.decode(latents)
    decode = in_turns(decoding, runs)
    ways = {"loop": work.loop, "ours": work.beside, "rendering alone": lambda: list(work.rendered())}
    video = in_turns(ways, runs)
    alone = video["rendering alone"]["median"]
    return {
        "segments": segments,
        "group_batch": bundle.vae.config.group_batch,
        "largest_pixel_difference": difference,
        "decode_s": decode,
        "video_s": video,
        "added_by_decoding_s": {way: video[way]["median"] - alone for way in ("loop", "ours")},
        "peak_mib": peaks,
    }


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--bundle", default="weights/tiny", metavar="DIR")
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    flags.add_argument("--segments", type=int, default=4)
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--output", metavar="FILE")
    arguments = flags.parse_args()
    bundle = load_bundle(arguments.bundle, device_or_exit(arguments.device))
    result = {"machine": machine(), **measured(bundle, arguments.segments, arguments.runs)}
    tell(result, arguments.output)


if __name__ == "__main__":
    main()
