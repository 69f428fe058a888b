"""The speed and memory of each part of a bundle on this machine, in this process, without Ray: JSON."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import pyarrow as pa

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation import VideoGenerator, default_options
from benchmarks.machine import machine, peak_memory_mib, tell, timed
from data_pipeline.clips import find_clips
from data_pipeline.decode import decode_row
from data_pipeline.encode import ClipEncoder
from data_pipeline.schema import DECODED
from data_pipeline.sources import find_sources
from data_pipeline.synthetic import write_samples
from jobs.command_line import InputError, existing, run

PROMPTS = ["a red circle moves to the right", "a red circle moves up"]


def bench_generation(bundle: Bundle, runs: int, segments: int) -> dict[str, Any]:
    """AR tokens/s, DiT steps/s, VAE frames/s (borders drawn back too), and seconds per video with the AR's share.

    `seconds`: of one segment in each stage.
    """
    generator, options = VideoGenerator(bundle), default_options(bundle.config.sampling)
    planner = generator.planner
    if planner is None:
        raise InputError(f"--bundle {bundle.path}: is text-only: there is no AR to measure")
    plan = next(planner.plan(PROMPTS[:1], 0, options))
    latents = generator.renderer.render(PROMPTS[0], plan.tokens, None, 0, 0, options).latents
    prompts = [PROMPTS[i * len(PROMPTS) // segments] for i in range(segments)]
    ar = timed(lambda: next(planner.plan(PROMPTS[:1], 0, options)), runs)
    dit = timed(lambda: generator.renderer.render(PROMPTS[0], plan.tokens, None, 0, 0, options), runs)
    last = generator.decoder.decode(latents)[-1]
    decode = timed(lambda: generator.decoder.decode(latents, last, options.seam_frames), runs)
    video = timed(lambda: [part.shape for part in generator.generate(prompts, 0, options)], max(2, runs // 2))
    planned = timed(lambda: [plan.index for plan in planner.plan(prompts, 0, options)], max(2, runs // 2))
    return {
        "seconds": {"ar": ar, "dit": dit, "decode": decode},
        "ar_tokens_per_s": plan.tokens.size / ar["median"],
        "dit_steps_per_s": options.steps / dit["median"],
        "decode_frames_per_s": latents.shape[1] // 5 * 17 / decode["median"],
        "video": {"segments": segments, "seconds": video, "ar_share": planned["median"] / video["median"]},
    }


def bench_preprocess(bundle: Bundle, runs: int) -> dict[str, float]:
    """Frames/s of decode, and of decode + VAE + text in a bare loop."""
    config = bundle.config
    with tempfile.TemporaryDirectory() as folder:
        write_samples(folder, 16, 0, config.video, (2,))
        sources = find_sources(folder)
        clips = [row for source in sources for row in find_clips(source, config.video, config.data)[0]]
        frames = sum(row["num_frames"] for row in clips)
        encoder = ClipEncoder(bundle.path / "vae", config.text, bounds=config.vae, batch_size=config.data.encode_batch)
        decoded = pa.Table.from_pylist([decode_row(row) for row in clips], schema=DECODED)
        decode = timed(lambda: [decode_row(row) for row in clips], runs)
        encode = timed(lambda: encoder(decoded), runs)
    seconds = decode["median"] + encode["median"]
    return {"decode_frames_per_s": frames / decode["median"], "preprocess_frames_per_s": frames / seconds}


def main() -> None:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--bundle", required=True, metavar="DIR", help="model bundle, by jobs/pipeline.py")
    flags.add_argument("--runs", type=int, default=5)
    flags.add_argument("--segments", type=int, default=4)
    flags.add_argument("--output", metavar="FILE", help="write the JSON there as well")
    arguments = flags.parse_args()
    bundle = load_bundle(existing(arguments.bundle, "--bundle"))
    result = {
        "machine": machine(),
        "config": bundle.config.name,
        **bench_generation(bundle, arguments.runs, arguments.segments),
        **bench_preprocess(bundle, arguments.runs),
        "peak_memory_mib": peak_memory_mib(),
    }
    tell(result, arguments.output)


if __name__ == "__main__":
    run(main)
