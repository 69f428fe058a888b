"""Latents to frames."""

from __future__ import annotations

import numpy as np
import torch

from arlon_ray.bundle import Bundle
from arlon_ray.config import GROUP_LATENTS
from arlon_ray.generation.seams import blend_seams
from arlon_ray.models.vae import to_frames


class FrameDecoder:
    """Decodes the latents of whole groups, each on its own, and blends at their borders (`seams.py`)."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.config, self.vae = bundle, bundle.config, bundle.vae

    def decode(self, latents: np.ndarray, before: np.ndarray | None = None, seam_frames: int = 0) -> np.ndarray:
        """Latents float32 [C, 5·G, h, w] to frames uint8 [17·G, H, W, 3].

        `before` uint8 [H, W, 3] is the last frame of what comes before, for the first border; `seam_frames`: see
        `blend_seams`. Raises ValueError on part groups and on latents that are no numbers, FloatingPointError on
        pixels that are none.
        """
        if not np.isfinite(latents).all():
            raise ValueError(f"{int((~np.isfinite(latents)).sum())} of {latents.size} latents are not finite")
        with self.bundle.at_work(self.vae):
            frames = to_frames(self.vae.decode(torch.from_numpy(latents)[None].to(self.bundle.device)))[0]
        return blend_seams(frames, before, seam_frames)

    def preview(self, tokens: np.ndarray, before: np.ndarray | None = None, seam_frames: int = 0) -> np.ndarray:
        """The same of a plan alone: tokens int32 [t', h', w'] of whole groups, without the DiT.

        It shows what is where and how it moves, as coarse as the codec is. Raises ValueError on part groups.
        """
        codec, size = self.bundle.codec, self.config.latent_grid
        per_group = codec.grid(GROUP_LATENTS, *size)[0]
        if tokens.ndim != 3 or len(tokens) % per_group:
            raise ValueError(f"tokens of shape {list(tokens.shape)}: expected whole groups of {per_group} token frames")
        with torch.no_grad():
            latents = codec.decode(torch.from_numpy(tokens)[None].long().to(self.bundle.device), size)
        return self.decode(latents[0].float().cpu().numpy(), before, seam_frames)
