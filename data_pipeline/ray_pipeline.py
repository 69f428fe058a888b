"""The one file that wires Ray Data: clip search, decode → encode → write with resume, and token extraction.

The stages themselves are plain functions (`clips`, `decode`, `encode`, `tokens`) that know no Ray.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from arlon_ray.config import Config, DataConfig, VideoConfig
from data_pipeline.clips import find_clips
from data_pipeline.decode import decode_row
from data_pipeline.encode import ClipEncoder
from data_pipeline.footage import fallback_notice
from data_pipeline.progress import Progress
from data_pipeline.schema import DECODED, Row
from data_pipeline.sources import SourceFile
from data_pipeline.staging import Staging
from data_pipeline.tokens import TokenWriter

#: Files of one clip-search task; a collection of no more files than `SEARCH_HERE` is searched in the driver, which is
#: done before a worker has started.
SEARCH_CHUNK = 64
SEARCH_HERE = 4096
#: CPUs that Ray sets aside for one task or actor. Together at most one, so that on a single core nobody starves the
#: others; unequal, because Ray runs equal neighbours one after the other in one process.
DECODE_CPUS, ENCODE_CPUS, WRITE_CPUS = 0.5, 0.25, 0.2
#: Bytes of decoded frames handed on at once (Ray's default: 128 MiB): what an interruption costs, and memory held.
BLOCK_BYTES = 32 * 2**20
#: Seconds between two looks at how far the run is.
POLL_S = 1.0


@contextmanager
def _quiet_context(checkpoint: Path | None) -> Iterator[None]:
    """Ray Data without its own bars and log lines, and with a checkpoint if one is given; undone at the end."""
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.checkpoint_config, context.print_on_execution_start
    block_bytes, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("ray.data", "ray._private")]
    context.enable_progress_bars = context.print_on_execution_start = False
    if checkpoint is not None:
        context.checkpoint_config = CheckpointConfig(
            id_column="clip_id", checkpoint_path=str(checkpoint), delete_checkpoint_on_success=False
        )
    for logger, _ in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.checkpoint_config, context.print_on_execution_start = before
        context.target_max_block_size = block_bytes
        for logger, level in loggers:
            logger.setLevel(level)


@contextmanager
def _watched(progress: Progress, count: Callable[[], int]) -> Iterator[None]:
    """Look at `count()` every second while the block runs."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(POLL_S):
            progress.reach(count())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
        progress.reach(count())
    finally:
        stop.set()
        watcher.join()


def _search(sources: list[SourceFile], video: VideoConfig, data: DataConfig) -> tuple[list[Row], list[Row], str]:
    """Clip rows, reject rows, and what is to be announced, of a few files."""
    clips: list[Row] = []
    rejects: list[Row] = []
    for source in sources:
        found, rejected = find_clips(source, video, data)
        clips += found
        rejects += rejected
    return clips, rejects, fallback_notice()


def _searched(
    chunks: list[list[SourceFile]], config: Config, remote: bool
) -> Iterator[tuple[int, tuple[list[Row], list[Row], str]]]:
    """(number, result) of every chunk, as they finish."""
    if not remote:
        for number, chunk in enumerate(chunks):
            yield number, _search(chunk, config.video, config.data)
        return
    task = ray.remote(num_cpus=DECODE_CPUS)(_search)
    pending = {task.remote(chunk, config.video, config.data): number for number, chunk in enumerate(chunks)}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        yield pending.pop(done[0]), ray.get(done[0])


def find_all_clips(sources: list[SourceFile], config: Config) -> tuple[list[Row], list[Row]]:
    """(clip rows, reject rows) of all files, in their order."""
    chunks = [sources[first : first + SEARCH_CHUNK] for first in range(0, len(sources), SEARCH_CHUNK)]
    results: dict[int, tuple[list[Row], list[Row], str]] = {}
    with Progress("find clips", len(sources), "files") as progress:
        for number, result in _searched(chunks, config, len(sources) > SEARCH_HERE):
            results[number] = result
            progress.advance(len(chunks[number]))
    ordered = [results[number] for number in range(len(chunks))]
    for notice in {notice for _, _, notice in ordered if notice}:
        print(f"note: {notice}", flush=True)
    return [row for clips, _, _ in ordered for row in clips], [row for _, rejects, _ in ordered for row in rejects]


def encode_clips(staging: Staging, config: Config, vae: Path, device: str, total: int) -> None:
    """Decode, encode and write every clip of `staging` that is not written yet. Interrupt it at will."""
    data = config.data
    threads = decoder_threads = data.decode_threads
    if device == "cpu":
        # a local Ray may offer more logical CPUs than the machine has
        cpus = min(int(ray.cluster_resources().get("CPU", 1)), os.cpu_count() or 1)
        threads = max(1, cpus // data.encoders)
    with (
        _quiet_context(staging.checkpoint),
        Progress("encode", total, "clips") as progress,
        _watched(progress, staging.encoded_rows),
    ):
        rows = ray.data.read_parquet(str(staging.clips), num_cpus=DECODE_CPUS)
        decoded = rows.map_batches(
            partial(_decode_table, threads=decoder_threads),
            batch_size=data.encode_batch,
            batch_format="pyarrow",
            num_cpus=DECODE_CPUS,
        )
        encoded = decoded.map_batches(
            ClipEncoder,
            batch_size=data.encode_batch,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=data.encoders),
            fn_constructor_args=(str(vae), config.text),
            fn_constructor_kwargs={
                "bounds": config.vae,
                "batch_size": data.encode_batch,
                "device": device,
                "threads": threads,
            },
            num_cpus=ENCODE_CPUS,
            num_gpus=data.encoder_gpus or None,
        )
        encoded.write_parquet(str(staging.encoded), partition_cols=["bucket"], ray_remote_args={"num_cpus": WRITE_CPUS})


def _decode_table(table: pa.Table, threads: int) -> pa.Table:
    return pa.Table.from_pylist([decode_row(row, threads) for row in table.to_pylist()], schema=DECODED)


def extract_all_tokens(
    files: list[tuple[Path, Path]], fine: Path, coarse: Path, config: Config, device: str, total: int
) -> None:
    """For each (latent file, token file): write the tokens. Files that are there already are the caller's to skip."""
    work: list[dict[str, Any]] = [{"latents": str(source), "tokens": str(target)} for source, target in files]
    if not work:
        return
    with _quiet_context(None), Progress("extract tokens", total, "clips") as progress:
        written = ray.data.from_items(work, override_num_blocks=len(work)).map(
            TokenWriter,  # type: ignore[arg-type]  # Ray's stub of map() forgets classes
            compute=ActorPoolStrategy(size=min(config.data.encoders, len(work))),
            fn_constructor_args=(str(fine), str(coarse)),
            fn_constructor_kwargs={"batch_size": config.data.encode_batch, "device": device},
            num_cpus=ENCODE_CPUS,
            num_gpus=config.data.encoder_gpus or None,
        )
        for row in written.iter_rows():
            progress.advance(row["rows"])
