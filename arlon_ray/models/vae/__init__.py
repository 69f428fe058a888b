"""Video VAEs behind one interface, `VideoVAE`: the small one of `tiny`, and Open-Sora v1.2's."""

from __future__ import annotations

from pathlib import Path

import torch

from arlon_ray.artifact import building, load_artifact
from arlon_ray.config import VaeConfig
from arlon_ray.models.vae.base import Posterior, VideoVAE, latent_frames
from arlon_ray.models.vae.folded import FoldedVAE
from arlon_ray.models.vae.pixels import to_frames, to_video

__all__ = ["FoldedVAE", "Posterior", "VideoVAE", "build_vae", "latent_frames", "load_vae", "to_frames", "to_video"]


def build_vae(config: VaeConfig) -> VideoVAE:
    """A VAE of the kind that `config` names, freshly initialised."""
    if config.kind == "folded":
        return FoldedVAE(config)
    from arlon_ray.models.vae.opensora import OpenSoraVAE  # needs diffusers

    return OpenSoraVAE(config)


def load_vae(path: str | Path, device: str | torch.device = "cpu", *, bounds: VaeConfig | None = None) -> VideoVAE:
    """The VAE at `path`, frozen, in evaluation mode. Raises ArtifactError.

    How much it codes at a time (`tile`, `group_batch`, `spatial.frame_batch`) is taken from `bounds`, if given.
    """
    artifact = load_artifact(path, "vae")
    tensors = artifact.tensors(device)
    with building(artifact):
        config = VaeConfig.model_validate(artifact.config)
        if bounds is not None:
            spatial = config.spatial.model_copy(update={"frame_batch": bounds.spatial.frame_batch})
            changes = {"tile": bounds.tile, "group_batch": bounds.group_batch, "spatial": spatial}
            config = config.model_copy(update=changes)
        with torch.device("meta"):
            vae = build_vae(config)
        vae.load_state_dict(tensors, assign=True)
    return vae.eval().requires_grad_(False)
