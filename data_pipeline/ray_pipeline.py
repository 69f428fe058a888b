"""The one file that wires Ray Data: clip search, decode → caption → encode → write, and token extraction.

The stages themselves are plain functions (`clips`, `decode`, `captioners`, `encode`, `tokens`) that know no Ray.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from arlon_ray import mirror
from arlon_ray.config import Config, DataConfig, FilterConfig, VideoConfig
from data_pipeline.captioners import ClipCaptioner
from data_pipeline.clips import find_clips
from data_pipeline.decode import Decoder
from data_pipeline.encode import ClipEncoder
from data_pipeline.footage import fallback_notice
from data_pipeline.manifest import settings_key
from data_pipeline.parquet import WRITTEN
from data_pipeline.progress import Progress
from data_pipeline.schema import CLIP, DECODED, REJECT, Row
from data_pipeline.sources import SourceFile
from data_pipeline.staging import Found, Staging, empty_found
from data_pipeline.tokens import TokenWriter

#: Files of one clip-search task; a collection of no more files than `SEARCH_HERE` is searched in the driver, which is
#: done before a worker has started.
SEARCH_CHUNK = 64
SEARCH_HERE = 4096
#: CPUs that Ray sets aside for one task or actor. Together at most one, so that on a single core nobody starves the
#: others; unequal, because Ray runs equal neighbours one after the other in one process.
DECODE_CPUS, ENCODE_CPUS, WRITE_CPUS, CAPTION_CPUS = 0.5, 0.25, 0.15, 0.1
#: Bytes of decoded frames handed on at once (Ray's default: 128 MiB): what an interruption costs, and memory held.
BLOCK_BYTES = 32 * 2**20
#: Seconds between two looks at how far the run is.
POLL_S = 1.0


@contextmanager
def _quiet_context() -> Iterator[None]:
    """Ray Data without its own bars and log lines; undone at the end."""
    context = DataContext.get_current()
    before = context.enable_progress_bars, context.print_on_execution_start
    block_bytes, context.target_max_block_size = context.target_max_block_size, BLOCK_BYTES
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("ray.data", "ray._private")]
    context.enable_progress_bars = context.print_on_execution_start = False
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)  # what breaks a run is raised, and reaches the user as one error
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before
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


def _search(sources: list[SourceFile], video: VideoConfig, data: DataConfig) -> tuple[Found, str]:
    """What is found in a few files, and what is to be announced."""
    clips: list[Row] = []
    rejects: list[Row] = []
    for source in sources:
        found, rejected = find_clips(source, video, data)
        clips += found
        rejects += rejected
    return (pa.Table.from_pylist(clips, CLIP), pa.Table.from_pylist(rejects, REJECT)), fallback_notice()


def _searched(
    chunks: dict[str, list[SourceFile]], config: Config, remote: bool
) -> Iterator[tuple[str, tuple[Found, str]]]:
    """(key, result) of every chunk, as they finish."""
    if not remote:
        for key, chunk in chunks.items():
            yield key, _search(chunk, config.video, config.data)
        return
    task = ray.remote(num_cpus=DECODE_CPUS)(_search)
    pending = {task.remote(chunk, config.video, config.data): key for key, chunk in chunks.items()}
    while pending:
        done, _ = ray.wait(list(pending), num_returns=1)
        yield pending.pop(done[0]), ray.get(done[0])


def find_all_clips(staging: Staging, sources: list[SourceFile], config: Config) -> Found:
    """Clips and rejects of all files, in their order; files that were searched before an interruption are not again."""
    chunks: dict[str, list[SourceFile]] = {}
    for first in range(0, len(sources), SEARCH_CHUNK):
        chunk = sources[first : first + SEARCH_CHUNK]
        chunks[settings_key({"files": [astuple(source) for source in chunk]})] = chunk
    results = {key: found for key in chunks if (found := staging.read_found(key)) is not None}
    left = {key: chunk for key, chunk in chunks.items() if key not in results}
    # shots are looked for in every frame: that is work for all of the machine, however few the files
    remote = len(sources) > SEARCH_HERE or config.data.shots != "none"
    notices: set[str] = set()
    with Progress("find clips", len(sources), "files") as progress:
        progress.advance(sum(len(chunks[key]) for key in results))
        for key, (found, notice) in _searched(left, config, remote):
            staging.write_found(key, found)
            results[key] = found
            notices |= {notice} if notice else set()
            progress.advance(len(chunks[key]))
    for notice in notices:
        print(f"note: {notice}", flush=True)
    ordered = [results[key] for key in chunks] or [empty_found()]
    return pa.concat_tables([clips for clips, _ in ordered]), pa.concat_tables([rejects for _, rejects in ordered])


def encode_clips(staging: Staging, clips: list[pa.Table], config: Config, vae: Path, device: str, total: int) -> None:
    """Decode, caption, encode and write `clips`, part by part, to `staging`. Interrupt it at will.

    A part is a task: its clips have one shape, and are all that is lost with it. (Not read from files by Ray: it makes
    one task of small files, however many.)
    """
    data, cpus = config.data, _cpus()
    encoders = min(data.encoders, len(clips))
    threads = max(1, min(cpus, os.cpu_count() or 1) // encoders) if device == "cpu" else 1
    batch: dict[str, Any] = {"batch_size": data.encode_batch, "batch_format": "pyarrow"}
    with (
        _quiet_context(),
        Progress("encode", total, "clips") as progress,
        _watched(progress, staging.encoded_rows),
    ):
        decode = partial(_decode_table, filters=data.filters, threads=data.decode_threads)
        # no more workers than cores: each takes seconds to start
        pool = TaskPoolStrategy(size=max(1, min(cpus // data.decode_threads, len(clips))))
        decoded = ray.data.from_arrow(clips).map_batches(decode, num_cpus=DECODE_CPUS, compute=pool, **batch)
        if data.captioner is not None:
            decoded = decoded.map_batches(
                ClipCaptioner,
                compute=ActorPoolStrategy(size=1),
                fn_constructor_args=(data.captioner, data.captioner_options),
                fn_constructor_kwargs={"batch_size": data.encode_batch},
                num_cpus=CAPTION_CPUS,
                num_gpus=data.captioner_gpus or None,
                **batch,
            )
        encoded = decoded.map_batches(
            ClipEncoder,
            compute=ActorPoolStrategy(size=encoders),
            fn_constructor_args=(str(vae), config.text),
            fn_constructor_kwargs={
                "bounds": config.vae,
                "batch_size": data.encode_batch,
                "device": device,
                "threads": threads,
            },
            num_cpus=ENCODE_CPUS,
            num_gpus=data.encoder_gpus or None,
            **batch,
        )
        files, place = mirror.filesystem(staging.encoded)
        encoded.write_parquet(
            place, filesystem=files, partition_cols=["bucket"], ray_remote_args={"num_cpus": WRITE_CPUS}, **WRITTEN
        )


def _cpus() -> int:
    """Cores of the cluster; a local Ray may offer more logical CPUs than its machine has."""
    offered = int(ray.cluster_resources().get("CPU", 1))
    return min(offered, os.cpu_count() or 1) if len(ray.nodes()) == 1 else offered


def _decode_table(table: pa.Table, filters: FilterConfig, threads: int) -> pa.Table:
    return pa.Table.from_pylist(list(map(Decoder(filters, threads), table.to_pylist())), schema=DECODED)


def extract_all_tokens(
    files: list[tuple[Path, Path]], fine: Path, coarse: Path, config: Config, device: str, total: int
) -> None:
    """For each (latent file, token file): write the tokens. Files that are there already are the caller's to skip."""
    work: list[dict[str, Any]] = [{"latents": str(source), "tokens": str(target)} for source, target in files]
    if not work:
        return
    with _quiet_context(), Progress("extract tokens", total, "clips") as progress:
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
