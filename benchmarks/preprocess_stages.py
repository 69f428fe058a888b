"""The work that `benchmarks.preprocess` measures, and where the time of a clip goes in one process with one thread."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from arlon_ray.config import Config, DataConfig
from data_pipeline.clips import find_clips
from data_pipeline.decode import decode_clip
from data_pipeline.encode import ClipEncoder
from data_pipeline.footage import open_footage
from data_pipeline.schema import DECODED, Row
from data_pipeline.scores import measure as measure_scores
from data_pipeline.sources import SourceFile, find_sources
from jobs.command_line import InputError

STAGES = ("search", "decode", "scores", "vae", "text", "write")
CAPTION = "a clip"
#: Clips of the table of stages; the first batch warms up and does not count.
TIMED_CLIPS = 96


@dataclass(frozen=True)
class Work:
    """What both do: the clips of the videos in `folder`, in the order in which Ray gets them."""

    config: Config
    folder: Path
    vae: Path
    sources: list[SourceFile]
    clips: list[Row]

    def batches(self) -> list[list[Row]]:
        """The clips, `data.encode_batch` at a time."""
        size = self.config.data.encode_batch
        return [self.clips[first : first + size] for first in range(0, len(self.clips), size)]


def collect(config: Config, source: str, copies: int, folder: Path, vae: Path) -> Work:
    """The work on `copies` links to every video of `source`, made in `folder`. Raises InputError if there is none."""
    videos = find_sources(source, config.data)
    for number in range(copies):
        for video in videos:
            link = folder / f"{number:05d}-{video.name.replace('/', '-')}"
            if not Path(video.path).is_file():
                raise InputError(f"--input {source}: {video.name}: not a file on this machine")
            link.symlink_to(Path(video.path).absolute())
            link.with_suffix(".txt").write_text(video.caption.text or CAPTION)
    sources = find_sources(folder, config.data)
    clips = [row for file in sources for row in find_clips(file, config.video, config.data)[0]]
    if not clips:
        raise InputError(
            f"--input {source}: no clips in {len(videos)} videos; expected some of the lengths of the buckets"
        )
    clips.sort(key=lambda row: (row["bucket"], row["source"], row["start_s"]))
    return Work(config, folder, vae, sources, clips)


def encoder_of(config: Config, vae: Path) -> ClipEncoder:
    return ClipEncoder(vae, config.text, bounds=config.vae, batch_size=config.data.encode_batch, threads=1)


class _Stopwatch:
    """CPU seconds of this process by stage: with one thread those of the clock, but for what others take of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.seconds[stage] += time.process_time() - begin


def stage_times(work: Work) -> dict[str, dict[str, float]]:
    """Seconds per clip and share of each stage, in this process with one thread. Raises InputError for few clips."""
    data, size = work.config.data, work.config.data.encode_batch
    full = [batch for batch in work.batches() if len({row["bucket"] for row in batch}) == 1 and len(batch) == size]
    # from everywhere in the list: clips of one bucket stand together
    chosen = full[:: max(1, len(work.clips) // TIMED_CLIPS)]
    if not chosen:
        raise InputError(f"--copies: no {size} clips (data.encode_batch) of one bucket in {len(work.clips)}; take more")
    clips, names = size * len(chosen), {row["source"] for batch in chosen for row in batch}
    threads = torch.get_num_threads(), cv2.getNumThreads()
    cv2.setNumThreads(1)
    encoder = encoder_of(work.config, work.vae)
    _timed_batch(encoder, data, chosen[0], _Stopwatch())  # warms up
    watch = _Stopwatch()
    for batch in chosen:
        _timed_batch(encoder, data, batch, watch)
    searched, found = _Stopwatch(), 0
    with searched("search"):
        for source in work.sources:
            if source.name in names:
                found += len(find_clips(source, work.config.video, data)[0])
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    per_clip = {stage: its / clips for stage, its in watch.seconds.items()}
    per_clip["search"] = searched.seconds["search"] / found
    total = sum(per_clip.values())
    return {stage: {"seconds_per_clip": its, "share": its / total} for stage, its in per_clip.items()}


def _timed_batch(encoder: ClipEncoder, data: DataConfig, batch: Sequence[Row], watch: _Stopwatch) -> None:
    """What `Decoder`, `ClipEncoder` and the writer do with clips of one bucket."""
    opened = lru_cache(maxsize=1)(open_footage)  # as `Decoder` keeps the last file
    with watch("decode"):
        frames = [decode_clip(row, footage=opened(row["uri"], data.decode_threads)) for row in batch]
    with watch("scores"):
        text = data.filters.max_text is not None
        scores = [measure_scores(its, row["fps"], text) for its, row in zip(frames, batch, strict=True)]
    with watch("vae"):
        encoder.encode_video(np.stack(frames))
    with watch("text"):
        encoder.text.encode([row["caption"] for row in batch])
    states = {"stage": "", "reason": "", "error": ""}
    rows = [{**row, **its, **states, "frames": f.tobytes()} for row, its, f in zip(batch, scores, frames, strict=True)]
    encoded = encoder(pa.Table.from_pylist(rows, schema=DECODED))
    with watch("write"), tempfile.TemporaryDirectory() as output:
        pq.write_table(encoded, Path(output) / "part.parquet")
