"""What a video costs against its length: memory at the peak, seconds a segment, and how far the stages overlap in time.

`python -m benchmarks.long_video --bundle weights/tiny --lengths 2 4 10 40 --output benchmarks/results/long_video.json`

Each video is made by a process of its own, in turns: as `jobs/generate.py` makes it (`overlapped`), and with one stage
after the other, each with all of torch's threads (`serial`). `busy`: seconds that AR, DiT, decoder and file took for a
segment. All are seconds a segment, behind the first one.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from arlon_ray.generation import HandOver, Timeline, VideoGenerator, default_options, segment_options
from arlon_ray.generation.video import GrowingVideo, encode_fragment
from benchmarks.machine import machine
from jobs.command_line import BOX, InputError, existing, parser, run
from jobs.generate import make_video, open_bundle

PROMPT = "A red circle moves to the right."
STAGES = ("ar", "dit", "decoder", "file")


def overlapped(generator: VideoGenerator, segments: int, path: Path, timeline: Timeline) -> None:
    """As `jobs/generate.py` does."""
    options = default_options(generator.bundle.config.sampling)
    make_video(generator, [PROMPT] * segments, path, 0, options, timeline=timeline)


def serial(generator: VideoGenerator, segments: int, path: Path, timeline: Timeline) -> None:
    """The same video with nothing at the same time."""
    options, texts, video = default_options(generator.bundle.config.sampling), [PROMPT] * segments, GrowingVideo(path)
    config = generator.bundle.config
    hand_over, handed, last = HandOver.of(config, texts), None, None
    plans = generator.planner.plan(texts, 0, options) if generator.planner else repeat(None)
    for index, text in enumerate(texts):
        plan = timeline.timed("ar", index, lambda: next(plans))
        its, taken = segment_options(options, texts, index), hand_over.taken(handed, index)
        render = partial(generator.renderer.render, text, plan.tokens if plan else None, taken, 0, index, its)
        latents = timeline.timed("dit", index, render).latents
        handed = hand_over.after(taken, latents, index)
        decode = partial(generator.decoder.decode, latents, last, options.seam_frames)
        frames = timeline.timed("decoder", index, decode)
        last = frames[-1]
        timeline.timed("file", index, lambda frames=frames: video.add(encode_fragment(frames, config.video.fps)))  # type: ignore[misc]
    video.finish()


WAYS = {"overlapped": overlapped, "serial": serial}


def measure(bundle: Path, segments: int, way: str) -> dict[str, Any]:
    """One video, in this process."""
    generator, timeline = VideoGenerator(open_bundle(bundle)), Timeline()
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way](generator, segments, Path(folder) / "v.mp4", timeline)
    busy = {stage: statistics.median(timeline.seconds(stage)[1:] or timeline.seconds(stage)) for stage in STAGES}
    written = sorted(end for stage, _, _, end in timeline.spans if stage == "file")
    return {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_segment_s": written[0],
        "segment_s": (written[-1] - written[0]) / max(1, segments - 1),
        **{f"busy.{stage}": seconds for stage, seconds in busy.items()},
    }


def summed(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of several runs: the largest memory, and medians."""
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return medians | {"peak_mib": max(run["peak_mib"] for run in runs)}


def main() -> None:
    """Command line."""
    if "--case" in sys.argv:
        folder, segments, way = sys.argv[sys.argv.index("--case") + 1 :][:3]
        print(json.dumps(measure(Path(folder), int(segments), way)))
        return
    flags = parser(__doc__ or "", output="long_video.json", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR")
    flags.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 10, 40], metavar="N", help="segments")
    flags.add_argument("--runs", type=int, default=3, metavar="N", help="of each, in turns (default: 3)")
    arguments = flags.parse_args()
    if min(arguments.lengths) < 2:
        raise InputError(f"--lengths {min(arguments.lengths)}: expected 2 or more segments")
    if arguments.runs < 1:
        raise InputError(f"--runs {arguments.runs}: expected 1 or more")
    bundle, rows = existing(arguments.bundle, "--bundle"), []
    for length in arguments.lengths:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.runs):
            for way, runs in found.items():
                words = [sys.executable, "-m", "benchmarks.long_video", "--case", str(bundle), str(length), way]
                ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
                runs.append(json.loads(ended.stdout.splitlines()[-1]))
        row = {way: summed(runs) for way, runs in found.items()}
        rows.append({"segments": length, **row})
        slowest = max(STAGES, key=lambda stage: row["serial"][f"busy.{stage}"])
        print(
            f"{length} segments: {row['overlapped']['peak_mib']:.0f} MiB, {row['overlapped']['segment_s']:.3f} s a "
            f"segment (one after the other {row['serial']['segment_s']:.3f}, of it {slowest} "
            f"{row['serial'][f'busy.{slowest}']:.3f})",
            flush=True,
        )
    result = {"machine": machine(), "bundle": bundle.name, "runs": arguments.runs, "lengths": rows}
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
