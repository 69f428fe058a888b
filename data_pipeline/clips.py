"""Row function: a source file → its clips. A clip has the length and the shape of one of the buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from arlon_ray.config import GROUP_FRAMES, LATENT_FRAMES, DataConfig, VideoConfig
from data_pipeline import schema
from data_pipeline.buckets import nearest, shapes
from data_pipeline.footage import Footage, FootageError, open_footage, scan
from data_pipeline.schema import STAGE_CLIPS, Row, bucket_name, reject_row
from data_pipeline.scores import FILE_THRESHOLDS, judge
from data_pipeline.shots import shot_spans
from data_pipeline.sources import Caption, SourceFile

#: Slack, in frames, for time stamps that are rounded (milliseconds in Matroska, float32 in decord).
SLACK_FRAMES = 0.05
#: Longer side, in pixels, at which shots are looked for.
SHOT_SIDE = 160
NO_CAPTION = "neither in the list of videos nor in a .txt or .json beside the file"


def split_spans(frames: int, lengths: Sequence[int], stride: int | None = None) -> Iterator[tuple[int, int]]:
    """Cut `frames` into spans (first frame, number of frames): the longest of `lengths` that fits, again and again.

    A span begins where the one before ends, or `stride` frames after it began: then they overlap, or leave frames out.
    A rest shorter than the shortest length belongs to no span.
    """
    start = 0
    while fitting := [length for length in lengths if start + length <= frames]:
        yield start, max(fitting)
        start += stride or max(fitting)


def clip_id(name: str, identity: str, start: int, frames: int, fps: float) -> int:
    """A positive int64 that depends only on the file (its name in the input and content) and the span."""
    text = f"{name}\0{identity}\0{start}\0{frames}\0{fps!r}"
    digest = hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def caption_at(caption: Caption, frame: int, fps: float) -> tuple[str, int]:
    """(the caption that holds at a frame counted at `fps`, the first frame that it holds at).

    A clip has the caption that holds where its last latent frame begins: a model is asked for that one at least.
    """
    text, began = caption.text, 0
    for part in caption.parts:
        first = int(np.ceil(part.start_s * fps - SLACK_FRAMES))
        if first > frame:
            break
        text, began = part.text, first
    return text, began


def find_clips(source: SourceFile, video: VideoConfig, data: DataConfig) -> tuple[list[Row], list[Row]]:
    """(clip rows, reject rows) of one file. Raises nothing: what is wrong with the file is a reject row."""
    try:
        footage = _opened(source, data.decode_threads)
        facts = _facts(footage)
        refused = _refused(source, facts, data)
        # every frame is decoded for them: not of a file that is refused anyway
        shots_s = _shots_s(source.path, footage.duration_s, data) if refused is None else []
    except FootageError as error:
        return [], [reject_row(source.name, STAGE_CLIPS, error.reason, str(error))]
    except Exception as error:
        return [], [reject_row(source.name, STAGE_CLIPS, schema.UNREADABLE, f"{type(error).__name__}: {error}")]
    if refused is not None:
        return [], [refused]
    spans = [span for shot in shots_s for span in _spans(shot, video.fps, data)]
    if not spans:
        return [], [_too_short(source, shots_s, video, data)]
    shape = nearest(footage.size, shapes(video, data))
    clips = [_clip(source, start, count, video.fps, shape, facts) for start, count in spans]
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


def _opened(source: SourceFile, threads: int) -> Footage:
    if source.error:
        raise FootageError(source.reason, source.error)
    if not source.size:
        raise FootageError(schema.EMPTY, "the file has no bytes")
    return open_footage(source.path, threads)


def _refused(source: SourceFile, facts: Row, data: DataConfig) -> Row | None:
    """Why a file that can be read is not looked into; None if it is."""
    if source.caption.error:
        return reject_row(source.name, STAGE_CLIPS, schema.BAD_CAPTION, source.caption.error)
    if not source.caption.said and data.captioner is None:
        return reject_row(source.name, STAGE_CLIPS, schema.MISSING_CAPTION, NO_CAPTION)
    reason, broken = judge(facts, data.filters, FILE_THRESHOLDS)
    return reject_row(source.name, STAGE_CLIPS, reason, broken) if reason else None


def _facts(footage: Footage) -> Row:
    """The columns that say what the whole file is."""
    height, width = footage.size
    return {"source_height": height, "source_width": width, "source_duration_s": footage.duration_s}


def _shots_s(path: str, duration_s: float, data: DataConfig) -> list[tuple[float, float]]:
    """(start, end) of every shot in seconds; the whole file where none are looked for."""
    if data.shots == "none":
        return [(0.0, duration_s)]
    return shot_spans(scan(path, SHOT_SIDE, data.decode_threads), duration_s, data.shots, data.shot_threshold)


def _lengths(data: DataConfig) -> list[int]:
    """Frames of the buckets, the shortest first."""
    return sorted({groups * GROUP_FRAMES for groups in data.bucket_groups})


def _spans(shot_s: tuple[float, float], fps: float, data: DataConfig) -> list[tuple[int, int]]:
    """(first frame, number of frames) of the clips in one shot, counted at `fps` from the file's first frame."""
    # not a frame of the shot before, not one of the shot after
    first, end = int(np.ceil(shot_s[0] * fps - SLACK_FRAMES)), int(np.floor(shot_s[1] * fps + SLACK_FRAMES))
    stride = data.stride_groups * GROUP_FRAMES if data.stride_groups else None
    return [(first + start, count) for start, count in split_spans(end - first, _lengths(data), stride)]


def _too_short(source: SourceFile, shots_s: list[tuple[float, float]], video: VideoConfig, data: DataConfig) -> Row:
    longest = max(end - start for start, end in shots_s)
    frames = int(np.floor(longest * video.fps + SLACK_FRAMES))
    where = f"in the longest of {len(shots_s)} shots" if len(shots_s) > 1 else "in it"
    message = f"{frames} frames at {video.fps:g} per second {where}, the shortest clip has {_lengths(data)[0]}"
    return reject_row(source.name, STAGE_CLIPS, schema.TOO_SHORT, message)


def _clip(source: SourceFile, start: int, frames: int, fps: float, shape: tuple[int, int], facts: Row) -> Row:
    height, width = shape
    caption, began = caption_at(source.caption, start + frames - LATENT_FRAMES, fps)
    return {
        "clip_id": clip_id(source.name, source.identity, start, frames, fps),
        "source": source.name,
        "uri": source.path,
        "start_s": start / fps,
        "end_s": (start + frames) / fps,
        "fps": fps,
        "height": height,
        "width": width,
        "num_frames": frames,
        "given_frames": max(0, began - start),
        "caption": caption,
        **facts,
        "bucket": bucket_name(frames, height, width),
    }
