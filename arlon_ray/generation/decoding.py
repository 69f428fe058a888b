"""Latents to frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.generation.seams import blend_seams


class FrameDecoder:
    """Decodes the latents of whole groups, each on its own, and blends at their borders (`seams.py`)."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config, self.vae = bundle, bundle.config, bundle.vae

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | torch.device = "cpu") -> FrameDecoder:
        """Open a bundle and load what decoding needs."""
        return cls(load_bundle(path, device))

    def decode(self, latents: np.ndarray, before: np.ndarray | None = None, seam_frames: int = 0) -> np.ndarray:
        """Latents float32 [C, 5·G, h, w] to frames uint8 [17·G, H, W, 3].

        `before` uint8 [H, W, 3] is the last frame of what comes before, for the first border; `seam_frames`: see
        `blend_seams`. Raises ValueError on part groups, and on values that are no numbers.
        """
        if not np.isfinite(latents).all():
            raise ValueError(f"{int((~np.isfinite(latents)).sum())} of {latents.size} latents are not finite")
        video = self.vae.decode(torch.from_numpy(latents)[None].to(self.bundle.device))[0]
        frames = ((video + 1.0) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
        return blend_seams(frames, before, seam_frames)
