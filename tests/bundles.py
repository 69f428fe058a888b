"""A complete bundle of minimal sizes with random weights, for tests that need a real one but not a good one."""

from __future__ import annotations

from pathlib import Path

import torch

from arlon_ray.artifact import Artifact, save_artifact
from arlon_ray.bundle import save_bundle
from arlon_ray.config import Config, VaeConfig, load_config
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.text import load_text_encoder
from arlon_ray.models.vae import FoldedVAE

SMALL = [
    "vae.width=16", "vae.deep_width=16", "vae.blocks=1",
    "vqvae.fine.width=16", "vqvae.coarse.width=16", "vqvae.fine.codebook_size=32", "vqvae.coarse.codebook_size=32",
    "vqvae.fine.blocks=1", "vqvae.coarse.blocks=1",
    "ar.dim=32", "ar.layers=2", "ar.heads=2", "dit.depth=2", "dit.hidden_size=32", "dit.num_heads=2",
    "dit.injection.width=16", "sampling.steps=2",
]  # fmt: skip


def small_config(*overrides: str) -> Config:
    """The tiny preset, smaller still."""
    return load_config("tiny", [*SMALL, *overrides])


def randomized(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """The model's state with every floating-point tensor drawn anew: zero-initialised outputs would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.1 if name != "scale" and "freqs" not in name else value
        for name, value in model.state_dict().items()
    }


def save_random_vae(folder: Path, config: VaeConfig) -> Artifact:
    """A VAE with the weights of seed 0, as an artefact in `folder`."""
    torch.manual_seed(0)
    tensors = FoldedVAE(config).state_dict()
    return save_artifact(folder, kind="vae", config=config.model_dump(mode="json"), tensors=tensors)


def make_random_parts(folder: Path, config: Config) -> dict[str, Path]:
    """Stage artefacts with lineage that fits together, each in its own folder."""
    channels, identity = config.vae.latent_channels, load_text_encoder(config.text).identity
    vae = save_artifact(
        folder / "vae", kind="vae", config=config.vae.model_dump(mode="json"),
        tensors=randomized(FoldedVAE(config.vae), 0),
    )  # fmt: skip
    parents = {"vae": vae.fingerprint}
    for i, (role, settings) in enumerate((("fine", config.vqvae.fine), ("coarse", config.vqvae.coarse)), start=1):
        codec = save_artifact(
            folder / f"codec_{role}", kind="codec", parents={"vae": vae.fingerprint},
            config={**settings.model_dump(mode="json"), "latent_channels": channels},
            tensors=randomized(LatentCodec(settings, channels), i),
        )  # fmt: skip
        parents[f"codec_{role}"] = codec.fingerprint
    parents["text"] = identity
    ar = ArTransformer(
        config.ar,
        codebook_size=config.vqvae.fine.codebook_size,
        text_dim=config.text.dim,
        max_text=config.text.max_tokens,
    )
    save_artifact(folder / "ar", kind="ar", config=ar.settings(), tensors=randomized(ar, 3), parents=parents)
    dit = STDiT3(config.dit)
    save_artifact(
        folder / "dit", kind="dit", config=config.dit.model_dump(mode="json"), tensors=randomized(dit, 4),
        parents=parents,
    )  # fmt: skip
    return {name: folder / name for name in ("vae", "codec_fine", "codec_coarse", "ar", "dit")}


def make_random_bundle(path: Path, *overrides: str) -> Path:
    """A loadable bundle at `path`."""
    config = small_config(*overrides)
    parts = make_random_parts(path.parent / f"{path.name}-parts", config)
    return save_bundle(path, config, parts, load_text_encoder(config.text).identity)
