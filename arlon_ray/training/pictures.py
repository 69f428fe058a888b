"""Small pictures for a run's page: strips of frames, one clip a row."""

from __future__ import annotations

import numpy as np


def strip(frames: np.ndarray, count: int = 6) -> np.ndarray:
    """`count` frames spread over uint8 [T, H, W, 3], side by side: uint8 [H, count·W, 3]."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def comparison(*clips: np.ndarray) -> np.ndarray:
    """Each argument is uint8 [B, T, H, W, 3]; row i shows clip i of all arguments side by side."""
    rows = [np.concatenate([strip(clip[i]) for clip in clips], axis=1) for i in range(len(clips[0]))]
    return np.concatenate(rows, axis=0)
