"""Preprocessing through Ray Data beside a bare loop of the same work on the same cores; where the time of a clip goes.

`python -m benchmarks.preprocess --input VIDEOS --copies 100 --output benchmarks/results/preprocess_two_cores.json`

*bare*: one process a core, each with one torch thread and its own model, takes batches from a queue until it is empty:
decode, encode, write; timed from the moment all models are loaded to the last write. *ray*: `run_preprocess`, timed by
the rows that appear. Its rate is that of the clips beyond those of a run on one file, which is Ray's start; between
the first and the last rows (`between_clips_per_s`) it is flattered by what was decoded ahead. Others on the machine
disturb the clock; CPU seconds per clip, of all processes and Ray's own among them, they disturb less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import queue
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from arlon_ray.artifact import load_artifact
from arlon_ray.config import Config, override
from benchmarks.machine import machine
from benchmarks.preprocess_stages import Work, collect, encoder_of, stage_times
from data_pipeline.decode import Decoder
from data_pipeline.schema import DECODED, Row
from data_pipeline.staging import Staging
from jobs.command_line import InputError, collection, parser, read_config, run, vae_folder
from jobs.preprocess import run_preprocess
from jobs.ray_session import OBJECT_STORE_BYTES
from jobs.render_samples import run_render_samples

PARTS = ("bare", "ray", "time", "scaling")
ENCODERS = (1, 2, 4)
PACKAGES = ("ray", "pyarrow", "decord", "av", "numpy", "opencv-python-headless")
#: Seconds between two looks at what Ray has written, and at its processes.
POLL_S = 0.2
#: Seconds in which all bare processes have loaded their models.
LOAD_S = 300.0


@dataclass(frozen=True)
class Mark:
    """A look at a run: seconds of the clock, rows written so far, CPU seconds of all its processes so far."""

    at_s: float
    rows: int
    cpu_s: float


def run_bare(work: Work) -> dict[str, float]:
    """All clips by one process a core."""
    workers, batches = len(os.sched_getaffinity(0)), work.batches()
    spawned = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as output,
        spawned.Manager() as shared,
        ProcessPoolExecutor(workers, mp_context=spawned) as pool,
    ):
        numbers, loaded = shared.Queue(), shared.Barrier(workers)
        for number in range(len(batches)):
            numbers.put(number)
        running = [
            pool.submit(_bare_worker, work.config, work.vae, batches, Path(output), numbers, loaded)
            for _ in range(workers)
        ]
        marks = [each.result() for each in running]
        written = sum(pq.read_metadata(path).num_rows for path in Path(output).glob("*.parquet"))
    if written != len(work.clips):
        raise RuntimeError(f"bare: {written} of {len(work.clips)} clips were written")
    seconds = max(end for _, end, _ in marks) - min(begin for begin, _, _ in marks)
    cpu_s = sum(cpu for _, _, cpu in marks)
    return {"seconds": seconds, "clips_per_s": written / seconds, "cpu_s_per_clip": cpu_s / written}


def _bare_worker(
    config: Config, vae: Path, batches: Sequence[list[Row]], output: Path, numbers: Any, loaded: Any
) -> tuple[float, float, float]:
    """(begin, end, CPU seconds) of one process; `numbers` is the queue of batches, `loaded` the barrier."""
    encoder = encoder_of(config, vae)
    decoder = Decoder(config.data.filters, config.data.decode_threads)
    loaded.wait(LOAD_S)
    begin, cpu_begin = time.monotonic(), time.process_time()
    while True:
        try:
            number = numbers.get_nowait()
        except queue.Empty:
            return begin, time.monotonic(), time.process_time() - cpu_begin
        table = pa.Table.from_pylist([decoder(row) for row in batches[number]], schema=DECODED)
        pq.write_table(encoder(table), output / f"part-{number:06d}.parquet")


def run_ray(work: Work) -> dict[str, float]:
    """Ray on all clips, less Ray on one file. Raises InputError where the clips are too few to tell them apart.

    `wall_s` is the whole call; a Ray that it has to start is in it.
    """
    (_, small, _), (begin, marks, end) = _ray(work, work.sources[0].path), _ray(work, str(work.folder))
    first, last, clips = marks[1], marks[-1], marks[-1].rows
    if clips != len(work.clips):
        raise RuntimeError(f"ray: {clips} of {len(work.clips)} clips were written")
    start, ready, more = small[-1].at_s - small[0].at_s, marks[0], clips - small[-1].rows
    seconds = last.at_s - ready.at_s - start
    if seconds <= 0 or first.rows == clips:
        raise InputError(f"--copies: {clips} clips take no longer than Ray takes to start; take more")
    cpu_s = last.cpu_s - ready.cpu_s - (small[-1].cpu_s - small[0].cpu_s)
    return {
        "seconds": seconds,
        "clips_per_s": more / seconds,
        "cpu_s_per_clip": cpu_s / more,
        "one_file_s": start,
        "wall_s": end - begin,
        "before_s": ready.at_s - begin,
        "first_rows_s": first.at_s - ready.at_s,
        "between_s": last.at_s - first.at_s,
        "after_s": end - last.at_s,
        "between_clips_per_s": (clips - first.rows) / (last.at_s - first.at_s),
        "whole_clips_per_s": clips / (end - begin),
    }


def _ray(work: Work, source: str) -> tuple[float, list[Mark], float]:
    """(begin, what was seen of the rows, end) of `run_preprocess`."""
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        begin = time.monotonic()
        with _watched(Staging(Path(output))) as marks:
            run_preprocess(work.config, source, Path(output), vae=work.vae)
        return begin, marks, time.monotonic()


@contextlib.contextmanager
def _watched(staging: Staging) -> Iterator[list[Mark]]:
    """Marks of what a run writes: the first when its work lies ready, then one whenever there are more rows."""
    stop, marks, cpu_s = threading.Event(), list[Mark](), dict[psutil.Process, float]()

    def look() -> None:
        while not stop.wait(POLL_S):
            _look_at_tree(cpu_s)
            # gone at the end of the run
            if staging.clips.exists() and (not marks or staging.encoded_rows() > marks[-1].rows):
                marks.append(Mark(time.monotonic(), staging.encoded_rows(), sum(cpu_s.values())))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield marks
    finally:
        stop.set()
        watcher.join()


def _look_at_tree(cpu_s: dict[psutil.Process, float]) -> None:
    """Note the CPU seconds of this process and all below it; what has ended stays as it was last seen.

    Ray ends idle workers, whose time then counts as nobody's.
    """
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            cpu_s[process] = sum(process.cpu_times()[:2])


def run_scaling(work: Work) -> dict[str, dict[str, float]]:
    """By the number of encoders, with as many logical CPUs: what Ray does."""
    import ray

    found = {}
    for encoders in ENCODERS:
        # but for the CPUs as `jobs.ray_session.connect` does, which then uses this one
        ray.init("local", num_cpus=encoders, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
                 log_to_driver=False, logging_level=logging.WARNING)  # fmt: skip
        try:
            found[str(encoders)] = run_ray(replace(work, config=override(work.config, [f"data.encoders={encoders}"])))
        finally:
            ray.shutdown()
        _say(f"ray, {encoders} encoders", found[str(encoders)])
    return found


def _say(name: str, figures: dict[str, float]) -> None:
    print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in figures.items())}", flush=True)


def run_side_by_side(work: Work, runs: int, parts: Sequence[str]) -> dict[str, Any]:
    """Bare and Ray in turn, every other run in the other order: medians, and Ray over bare if both were asked for."""
    kinds: dict[str, Callable[[Work], dict[str, float]]] = {"bare": run_bare, "ray": run_ray}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds if name in parts}
    for number in range(runs):
        for name in list(found)[:: -1 if number % 2 else 1]:
            load = os.getloadavg()[0]
            found[name].append({**kinds[name](work), "load_before": load})
            _say(f"{name} {number + 1}/{runs}", found[name][-1])
    result: dict[str, Any] = {}
    for name, each in found.items():
        result[name] = {"median": {key: statistics.median(run[key] for run in each) for key in each[0]}, "runs": each}
    if len(result) == len(kinds):
        bare, ray = result["bare"]["median"], result["ray"]["median"]
        rates = {name: ray[name] / bare["clips_per_s"] for name in ray if name.endswith("clips_per_s")}
        result["ray_over_bare"] = {**rates, "cpu_s_per_clip": ray["cpu_s_per_clip"] / bare["cpu_s_per_clip"]}
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows: dict[str, dict[str, float]] = {kind: result[kind]["median"] for kind in PARTS[:2] if kind in result}
    rows |= {f"ray, {encoders} encoders": its for encoders, its in result.get("scaling", {}).items()}
    lines = ["| run | clips/s | whole call, clips/s | CPU s per clip |", "|---|---|---|---|"]
    for name, its in rows.items():
        whole = its.get("whole_clips_per_s", its["clips_per_s"])
        lines.append(f"| {name} | {its['clips_per_s']:.3g} | {whole:.3g} | {its['cpu_s_per_clip']:.3g} |")
    if "ray_over_bare" in result:
        lines.append(f"\nray / bare: {', '.join(f'{key} {its:.2f}' for key, its in result['ray_over_bare'].items())}")
    lines += ["", "| stage | ms per clip | share |", "|---|---|---|"] if "time" in result else []
    for stage, its in result.get("time", {}).items():
        lines.append(f"| {stage} | {1000 * its['seconds_per_clip']:.2f} | {its['share']:.1%} |")
    return "\n".join(lines)


def _facts(work: Work, copies: int) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # it must not get in the way of somebody's commit
        capture_output=True,
        text=True,
        check=False,
    )
    data = work.config.data
    return {
        "machine": {**machine(), "cores_used": len(os.sched_getaffinity(0))},
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() or None,
        "config": {"name": work.config.name, "data": data.model_dump(mode="json", exclude_defaults=True)},
        "vae": load_artifact(work.vae, "vae").fingerprint,
        "copies": copies,
        "files": len(work.sources),
        "clips": dict(Counter(row["bucket"] for row in work.clips)),
    }


def _checked(flags: argparse.Namespace, config: Config) -> None:
    """Raise InputError for what cannot be measured."""
    for name in ("copies", "runs", "scenes"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)}: expected at least 1")
    if os.environ.get("RAY_ADDRESS"):
        raise InputError("RAY_ADDRESS is set: that cluster is not the cores of the bare loop; unset it")
    if config.data.encoder_gpus or config.data.captioner:
        raise InputError("data.encoder_gpus and data.captioner are not measured here: leave them out")
    if not Path(flags.output).absolute().parent.is_dir():
        raise InputError(f"--output {flags.output}: its folder is not there")


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="preprocess.json")
    flags.add_argument("--input", metavar="INPUT", help="videos, as jobs/preprocess.py takes them (default: rendered)")
    flags.add_argument("--scenes", type=int, default=400, help="scenes rendered where there is no --input")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init of the configuration)")
    flags.add_argument("--copies", type=int, default=1, help="how often each file is used, under other names")
    flags.add_argument("--runs", type=int, default=3, help="runs of bare and of ray")
    flags.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    options = flags.parse_args()
    config = read_config(options)
    _checked(options, config)
    vae = vae_folder(options.vae, config)
    # Ray has its workers give way to others (15 above its own niceness), the bare loop does not: on a busy machine
    # that would be measured
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as rendered, tempfile.TemporaryDirectory() as folder:
        if options.input is None:
            run_render_samples(config, Path(rendered), count=options.scenes)
        source = rendered if options.input is None else collection(options.input, "--input")
        work = collect(config, source, options.copies, Path(folder), vae)
        result = _facts(work, options.copies)
        if "time" in options.parts:
            result["time"] = stage_times(work)
        result |= run_side_by_side(work, options.runs, options.parts)
        if "scaling" in options.parts:
            result["scaling"] = run_scaling(work)
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{table(result)}\n\n{options.output}")


if __name__ == "__main__":
    run(main)
