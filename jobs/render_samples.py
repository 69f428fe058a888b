"""Render captioned sample videos: real H.264 files of moving shapes, with captions and ground truth beside them."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from arlon_ray import mirror
from arlon_ray.config import Config
from data_pipeline.progress import Progress
from data_pipeline.synthetic import remove_samples_from, write_sample
from jobs.command_line import InputError, output_folder, parser, read_config, run

CHUNK = 50


def render_chunk(indices: range, *, folder: Path, seed: int, config: Config) -> int:
    """Render the missing samples among `indices`; how many were rendered."""
    data = config.data
    return sum(
        write_sample(folder, index, seed, config.video, data.bucket_groups, data.sample_grade) for index in indices
    )


def run_render_samples(config: Config, folder: Path, *, count: int | None = None, seed: int | None = None) -> int:
    """Make `folder` hold exactly the samples 0 … count-1 of `seed`; how many had to be rendered.

    Default: `data.sample_videos` and `seed` of the configuration.
    """
    total = config.data.sample_videos if count is None else count
    mirror.pull(folder).mkdir(parents=True, exist_ok=True)
    remove_samples_from(folder, total)
    work = partial(render_chunk, folder=folder, seed=config.seed if seed is None else seed, config=config)
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    # spawned, not forked: the caller may hold threads of Ray or torch
    context = multiprocessing.get_context("spawn")
    workers = min(len(os.sched_getaffinity(0)), len(chunks))
    rendered = 0
    with ProcessPoolExecutor(workers, mp_context=context) as pool, Progress("render", total, "videos") as progress:
        try:
            for chunk, made in zip(chunks, pool.map(work, chunks), strict=True):
                rendered += made
                progress.advance(len(chunk))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    mirror.push(folder)
    return rendered


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/samples")
    flags.add_argument("--count", type=int, help="videos (default: data.sample_videos)")
    flags.add_argument("--seed", type=int, help="seed (default: that of the configuration)")
    arguments = flags.parse_args()
    config = read_config(arguments)
    if arguments.count is not None and arguments.count < 1:
        raise InputError(f"--count {arguments.count}: expected at least 1")
    if arguments.seed is not None and not 0 <= arguments.seed < 10**9:
        raise InputError(f"--seed {arguments.seed}: expected 0 to {10**9 - 1}")
    folder = output_folder(arguments)
    rendered = run_render_samples(config, folder, count=arguments.count, seed=arguments.seed)
    total = config.data.sample_videos if arguments.count is None else arguments.count
    print(
        f"{mirror.named(str(folder))}: {total} videos ({rendered} rendered now, {total - rendered} were there already)"
    )


if __name__ == "__main__":
    run(main)
