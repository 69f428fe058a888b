"""Latents to frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from arlon_ray.bundle import Bundle, load_bundle


class FrameDecoder:
    """Decodes the latents of whole groups, each on its own: segments join without a seam of our making."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config, self.vae = bundle, bundle.config, bundle.vae

    @classmethod
    def from_bundle(cls, path: str | Path, device: str | torch.device = "cpu") -> FrameDecoder:
        """Open a bundle and load what decoding needs."""
        return cls(load_bundle(path, device))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents float32 [C, 5·G, h, w] to frames uint8 [17·G, H, W, 3].

        Raises ValueError on part groups, and on values that are no numbers.
        """
        if not np.isfinite(latents).all():
            raise ValueError(f"{int((~np.isfinite(latents)).sum())} of {latents.size} latents are not finite")
        video = self.vae.decode(torch.from_numpy(latents)[None].to(self.bundle.device))[0]
        return ((video + 1.0) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
