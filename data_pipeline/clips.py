"""Row function: a source file → its clips. A clip is as many frames, at the target rate, as one of the buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from arlon_ray.config import GROUP_FRAMES, DataConfig, VideoConfig
from data_pipeline import schema
from data_pipeline.footage import FootageError, open_footage
from data_pipeline.schema import STAGE_CLIPS, Row, bucket_name, reject_row
from data_pipeline.sources import SourceFile

#: Slack, in frames, for time stamps that are rounded (milliseconds in Matroska, float32 in decord).
SLACK_FRAMES = 0.05
NO_CAPTION = "neither in the list of videos nor in a .txt or .json beside the file"


def split_spans(frames: int, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut `frames` into spans (first frame, number of frames): the longest of `lengths` that fits, again and again.

    Spans do not overlap; a rest shorter than the shortest length belongs to no span.
    """
    start = 0
    while True:
        fitting = [length for length in lengths if start + length <= frames]
        if not fitting:
            return
        yield start, max(fitting)
        start += max(fitting)


def clip_id(name: str, identity: str, start: int, frames: int, fps: float) -> int:
    """A positive int64 that depends only on the file (its name in the input and content) and the span."""
    text = f"{name}\0{identity}\0{start}\0{frames}\0{fps!r}"
    digest = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def find_clips(source: SourceFile, video: VideoConfig, data: DataConfig) -> tuple[list[Row], list[Row]]:
    """(clip rows, reject rows) of one file. Raises nothing: what is wrong with the file is a reject row."""
    try:
        duration_s = _duration_s(source, data.decode_threads)
    except FootageError as error:
        return [], [reject_row(source.name, STAGE_CLIPS, error.reason, str(error))]
    except Exception as error:
        return [], [reject_row(source.name, STAGE_CLIPS, schema.UNREADABLE, f"{type(error).__name__}: {error}")]
    if source.caption_error:
        return [], [reject_row(source.name, STAGE_CLIPS, schema.BAD_CAPTION, source.caption_error)]
    if not source.caption:
        return [], [reject_row(source.name, STAGE_CLIPS, schema.MISSING_CAPTION, NO_CAPTION)]
    frames = int(np.floor(duration_s * video.fps + SLACK_FRAMES))
    lengths = sorted({groups * GROUP_FRAMES for groups in data.bucket_groups}, reverse=True)
    spans = list(split_spans(frames, lengths))
    if not spans:
        message = f"{frames} frames at {video.fps:g} per second, the shortest clip has {lengths[-1]}"
        return [], [reject_row(source.name, STAGE_CLIPS, schema.TOO_SHORT, message)]
    clips = [_clip(source, start, count, video) for start, count in spans]
    kept, beyond = clips[: data.max_clips_per_video], clips[data.max_clips_per_video :]
    return kept, [
        reject_row(
            source.name,
            STAGE_CLIPS,
            schema.TOO_MANY_CLIPS,
            clip_id=row["clip_id"],
            start_s=row["start_s"],
            end_s=row["end_s"],
        )
        for row in beyond
    ]


def _duration_s(source: SourceFile, threads: int) -> float:
    if source.error:
        raise FootageError(source.reason, source.error)
    if not source.size:
        raise FootageError(schema.EMPTY, "the file has no bytes")
    return float(open_footage(source.path, threads).times_s[-1])


def _clip(source: SourceFile, start: int, frames: int, video: VideoConfig) -> Row:
    return {
        "clip_id": clip_id(source.name, source.identity, start, frames, video.fps),
        "source": source.name,
        "uri": source.path,
        "start_s": start / video.fps,
        "end_s": (start + frames) / video.fps,
        "fps": video.fps,
        "height": video.height,
        "width": video.width,
        "num_frames": frames,
        "caption": source.caption,
        "bucket": bucket_name(frames, video.height, video.width),
    }
