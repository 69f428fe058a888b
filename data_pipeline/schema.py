"""The rows that the stages hand on, as explicit Arrow schemas. Change one, and `SCHEMA_VERSION` goes up.

Shapes: C latent channels, t latent frames, h × w latent grid, L valid text tokens, D text width.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 3

#: One clip: `num_frames` frames of `height` × `width` at `fps`, taken from seconds [start_s, end_s) of the file `uri`.
#: `source` is the path within the input; `bucket` is the clip's shape, "TxHxW"; `source_*` are of the whole file, as it
#: is shown (a rotation applied). The first `given_frames` belong to an earlier caption than `caption`: a model is shown
#: them, and never asked for them.
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
        pa.field("given_frames", pa.int32(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("source_height", pa.int32(), nullable=False),
        pa.field("source_width", pa.int32(), nullable=False),
        pa.field("source_duration_s", pa.float64(), nullable=False),
        pa.field("bucket", pa.string(), nullable=False),
    ]
)

#: What `scores.py` measures of a clip's frames; null where that was not measured. `phash` is 24 bytes.
SCORES = pa.schema(
    [
        pa.field("black", pa.float32()),
        pa.field("frozen", pa.float32()),
        pa.field("motion", pa.float32()),
        pa.field("sharpness", pa.float32()),
        pa.field("text", pa.float32()),
        pa.field("phash", pa.binary()),
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
        *SCORES,
    ]
)

#: A file of the input: `identity` is a hash of its size and of both its ends, `caption` the one that came with it.
SOURCE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
    ]
)

#: A clip that was decoded, or was to be: `reason` is empty if it is in the dataset.
SEEN = pa.schema([*CLIP, *SCORES, pa.field("reason", pa.string(), nullable=False)])

#: `latent` is float16 [C,t,h,w] as raw bytes, `text_embedding` float16 [L,D] as raw bytes, L = `text_length`.
LATENT = pa.schema(
    [
        *(field for field in CLIP if field.name != "bucket"),
        *SCORES,
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

#: A clip with its pixels: uint8 [T,H,W,3] as raw bytes; empty, with stage and reason, where decoding failed or a filter
#: held it back.
DECODED = pa.schema(
    [
        *CLIP,
        *SCORES,
        pa.field("frames", pa.large_binary(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
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
SHORT_FILE = "file too short"
LOW_RESOLUTION = "low resolution"
BLACK = "black"
FROZEN = "frozen"
LITTLE_MOTION = "little motion"
MUCH_MOTION = "much motion"
BLURRED = "blurred"
TEXT_HEAVY = "text-heavy"
NEAR_DUPLICATE = "near-duplicate"
FILTER_REASONS = frozenset(
    {TOO_SHORT, MISSING_CAPTION, TOO_MANY_CLIPS, LISTED_TWICE, SHORT_FILE, LOW_RESOLUTION}
    | {BLACK, FROZEN, LITTLE_MOTION, MUCH_MOTION, BLURRED, TEXT_HEAVY, NEAR_DUPLICATE}
)
#: Failures.
UNREADABLE = "unreadable"
EMPTY = "empty file"
NO_VIDEO = "no video stream"
BAD_CAPTION = "unreadable caption"
DECODE_FAILED = "decoding failed"
CAPTION_FAILED = "captioning failed"
ENCODE_FAILED = "encoding failed"

#: The stages that may reject.
STAGE_CLIPS, STAGE_DECODE, STAGE_CAPTION, STAGE_ENCODE = "clips", "decode", "caption", "encode"
#: `decode` also measures; `filter` looks at what it measured, the last of them at the whole collection.
STAGE_FILTER = "filter"

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
        **dict.fromkeys(SCORES.names),
    }


def one_line(error: object) -> str:
    """An error's text as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]
