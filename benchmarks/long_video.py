"""What a video costs against its length: memory at the peak, seconds a segment, and how far the stages overlap in time.

`python -m benchmarks.long_video --bundle weights/tiny --lengths 2 4 10 40 --output benchmarks/results/long_video.json`

Each length is a process of its own (`jobs/generate.py`'s own function). `busy` is the seconds that AR, DiT, decoder and
file took for a segment, one after the other; `segment_s` is how long a segment really took, behind the first one.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from arlon_ray.generation import Timeline, VideoGenerator, default_options
from benchmarks.machine import machine
from jobs.command_line import BOX, InputError, existing, parser, run
from jobs.generate import make_video, open_bundle

PROMPT = "A red circle moves to the right."
STAGES = ("ar", "dit", "decoder", "file")


def measure(bundle: Path, segments: int) -> dict[str, Any]:
    """One video, in this process."""
    generator, timeline = VideoGenerator(open_bundle(bundle)), Timeline()
    options = default_options(generator.bundle.config.sampling)
    with tempfile.TemporaryDirectory() as folder:
        frames = make_video(generator, [PROMPT] * segments, Path(folder) / "v.mp4", 0, options, timeline=timeline)
    busy = {stage: statistics.median(timeline.seconds(stage)[1:] or timeline.seconds(stage)) for stage in STAGES}
    written = sorted(end for stage, _, _, end in timeline.spans if stage == "file")
    return {
        "segments": segments,
        "frames": frames,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_segment_s": written[0],
        "segment_s": (written[-1] - written[0]) / max(1, segments - 1),
        "busy": busy,
    }


def main() -> None:
    """Command line."""
    if "--case" in sys.argv:
        folder, segments = sys.argv[sys.argv.index("--case") + 1 :][:2]
        print(json.dumps(measure(Path(folder), int(segments))))
        return
    flags = parser(__doc__ or "", output="long_video.json", config=False)
    flags.add_argument("--bundle", default=str(BOX), metavar="DIR")
    flags.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 10, 40], metavar="N", help="segments")
    arguments = flags.parse_args()
    if min(arguments.lengths) < 2:
        raise InputError(f"--lengths {min(arguments.lengths)}: expected 2 or more segments")
    bundle, rows = existing(arguments.bundle, "--bundle"), []
    for length in arguments.lengths:
        words = [sys.executable, "-m", "benchmarks.long_video", "--case", str(bundle), str(length)]
        ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        rows.append(json.loads(ended.stdout.splitlines()[-1]))
        row, serial = rows[-1], sum(rows[-1]["busy"].values())
        print(
            f"{length} segments: {row['peak_mib']:.0f} MiB, {row['segment_s']:.2f} s a segment "
            f"(one after the other {serial:.2f}, the slowest stage {max(row['busy'].values()):.2f})",
            flush=True,
        )
    result = {"machine": machine(), "bundle": bundle.name, "lengths": rows}
    Path(arguments.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
