"""Pixels as video files have them, and as a VAE takes and gives them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_video(frames: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).to(device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def to_frames(video: Tensor) -> np.ndarray:
    """float [B, 3, T, H, W] to uint8 [B, T, H, W, 3]; what is outside of [-1, 1] is cut off.

    Raises FloatingPointError for values that are no numbers: as bytes they would look like a picture.
    """
    video = video.clamp(-1.0, 1.0)  # the one copy: a long video's pixels are gigabytes
    if video.sum().isnan():
        raise FloatingPointError(f"{int(video.isnan().sum())} of {video.numel()} pixels are not numbers")
    return video.add_(1.0).mul_(127.5).round_().byte().permute(0, 2, 3, 4, 1).cpu().numpy()
