"""The gates between the pipeline's stages, on scenes that no training has seen (`arlon_ray/evaluation/gates.py`)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from arlon_ray.config import Config
from arlon_ray.evaluation.gates import check_gate, plan_survival, survival, through_vae
from arlon_ray.models.ar import load_ar
from arlon_ray.models.codec import load_codec
from arlon_ray.models.text import load_text_encoder
from arlon_ray.models.vae import load_vae
from data_pipeline.synthetic import render
from data_pipeline.worlds import caption, held_out_scenes


class Gates:
    """What the gates of one configuration look at."""

    def __init__(self, config: Config) -> None:
        self.config, self.shares = config, config.gates
        self.scenes = list(islice(held_out_scenes(config, "gate"), config.gates.scenes))


def check_codec(gates: Gates, vae_path: Path, codec_path: Path) -> None:
    """Shapes through the VAE, directions through VAE and fine codec. Raises GateError."""
    vae, shares = load_vae(vae_path), gates.shares
    shots = [(scene.shots[0], render(scene)) for scene in gates.scenes]
    if shares.vae_shape:
        found = survival(shots, through_vae(vae))
        check_gate("vae", found, {"object_class": shares.vae_shape}, "train it longer (vae.training.steps) or wider")
    if shares.codec_motion:
        found = survival(shots, through_vae(vae, load_codec(codec_path)))
        advice = "train it longer (vqvae.fine.training.steps) or with more codes"
        check_gate("vqvae fine", found, {"direction": shares.codec_motion}, advice)


def check_ar(gates: Gates, vae_path: Path, codec_path: Path, ar_path: Path) -> None:
    """Directions in the AR's own plans, decoded without a DiT. Raises GateError."""
    if not gates.shares.ar_motion:
        return
    pairs = [(caption(scene), scene.shots[0]) for scene in gates.scenes]
    parts = (load_vae(vae_path), load_codec(codec_path), load_ar(ar_path), load_text_encoder(gates.config.text))
    found = plan_survival(pairs, *parts, gates.config)
    advice = "train it longer (ar.training.steps) or on more videos (data.sample_videos)"
    check_gate("ar", found, {"direction": gates.shares.ar_motion}, advice)
