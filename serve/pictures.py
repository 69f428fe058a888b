"""Pictures of a finished video: a thumbnail and a sheet of its frames, as PNG."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from arlon_ray.generation.video import as_rgb, contact_sheet
from serve.job_files import PICTURES, VIDEO_FILE, JobFiles

Variant = Literal["video", "thumbnail", "spritesheet"]
FILES: dict[str, str] = {"video": VIDEO_FILE, **PICTURES}

_SHEET = 48  # frames of a sheet, in rows of 8


def draw(files: JobFiles, variant: Variant) -> None:
    """Make a picture of the video, unless it is there. Raises FileNotFoundError without a video. Blocks."""
    import av

    if files.exists(FILES[variant]):
        return
    opened: Any = av.open(io.BytesIO(files.read(VIDEO_FILE)))
    with opened as video:
        count = video.streams.video[0].frames
        chosen = (
            {count // 2} if variant == "thumbnail" else set(np.linspace(0, count - 1, min(_SHEET, count)).astype(int))
        )
        shown = (frame for index, frame in enumerate(video.decode(video=0)) if index in chosen)
        frames = list(as_rgb(shown))
    with tempfile.TemporaryDirectory() as folder:
        files.write(FILES[variant], contact_sheet(Path(folder) / "sheet.png", np.stack(frames)).read_bytes())
