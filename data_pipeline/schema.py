"""The rows that the stages hand on, as explicit Arrow schemas. Change one, and `SCHEMA_VERSION` goes up.

Shapes: C latent channels, t latent frames, h × w latent grid, L valid text tokens, D text width.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1

#: One clip: `num_frames` frames of `height` × `width` at `fps`, taken from seconds [start_s, end_s) of the file `uri`.
#: `source` is the path within the input; `bucket` is the clip's shape, "TxHxW".
CLIP = pa.schema(
    [
        pa.field("clip_id", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
    ]
)

#: Why a clip (or a whole file, then without a span) is not in the dataset.
REJECT = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("clip_id", pa.int64()),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

#: `latent` is float16 [C,t,h,w] as raw bytes, `text_embedding` float16 [L,D] as raw bytes, L = `text_length`.
LATENT = pa.schema(
    [
        *(field for field in CLIP if field.name != "bucket"),
        pa.field("latent", pa.binary(), nullable=False),
        pa.field("latent_shape", pa.list_(pa.int32()), nullable=False),
        pa.field("text_embedding", pa.binary(), nullable=False),
        pa.field("text_length", pa.int32(), nullable=False),
    ]
)

#: Tokens of both codecs, flattened from their grids [t,h,w]. The rows stand in the order of the latent file.
TOKEN = pa.schema(
    [
        pa.field("clip_id", pa.int64(), nullable=False),
        pa.field("tokens_fine", pa.list_(pa.int32()), nullable=False),
        pa.field("grid_fine", pa.list_(pa.int32()), nullable=False),
        pa.field("tokens_coarse", pa.list_(pa.int32()), nullable=False),
        pa.field("grid_coarse", pa.list_(pa.int32()), nullable=False),
    ]
)

#: A clip with its pixels: uint8 [T,H,W,3] as raw bytes; empty, with the reason, where decoding failed.
DECODED = pa.schema(
    [
        *CLIP,
        pa.field("frames", pa.large_binary(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

#: What the encoders hand to the writer. Rejected clips go the same way, in a bucket of their own, so that Ray Data's
#: checkpoint counts them as done.
ENCODED = pa.schema(
    [
        *LATENT,
        CLIP.field("bucket"),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
REJECTED_BUCKET = "rejected"

#: Reasons that are a matter of the input's content. Every other reason is a failure.
TOO_SHORT = "too short"
MISSING_CAPTION = "missing caption"
TOO_MANY_CLIPS = "above max_clips_per_video"
LISTED_TWICE = "listed twice"
FILTER_REASONS = frozenset({TOO_SHORT, MISSING_CAPTION, TOO_MANY_CLIPS, LISTED_TWICE})
#: Failures.
UNREADABLE = "unreadable"
EMPTY = "empty file"
NO_VIDEO = "no video stream"
BAD_CAPTION = "unreadable caption"
DECODE_FAILED = "decoding failed"
ENCODE_FAILED = "encoding failed"

#: The stages that may reject.
STAGE_CLIPS, STAGE_DECODE, STAGE_ENCODE = "clips", "decode", "encode"

Row = dict[str, Any]


def bucket_name(num_frames: int, height: int, width: int) -> str:
    """The bucket of a clip's shape: "34x64x64"."""
    return f"{num_frames}x{height}x{width}"


def reject_row(
    source: str,
    stage: str,
    reason: str,
    error: str = "",
    *,
    clip_id: int | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Row:
    """A row of `REJECT`. `error` is cut to one line of 500 characters."""
    return {
        "source": source,
        "clip_id": clip_id,
        "start_s": start_s,
        "end_s": end_s,
        "stage": stage,
        "reason": reason,
        "error": one_line(error),
    }


def one_line(error: object) -> str:
    """An error's text as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]
