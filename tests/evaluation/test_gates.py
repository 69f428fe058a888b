"""Gates: what a perfect stage lets through, what a blind one loses, and the line that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from arlon_ray.evaluation.gates import GateError, check_gate, survival
from data_pipeline.synthetic import render, sample_scene
from jobs.gates import Gates, check_ar, check_codec
from tests.bundles import make_random_parts, small_config


def test_what_survives_is_told_by_name() -> None:
    scenes = [sample_scene(40 + i, (2,)) for i in range(6)]
    shots = [(scene.shots[0], render(scene)) for scene in scenes]
    whole = survival(shots, lambda video: video)
    assert whole == {"object_class": 1.0, "colour": 1.0, "direction": 1.0}
    frozen = survival(shots, lambda video: video[:, :, :1].expand_as(video))
    assert frozen["colour"] == 1.0 and frozen["direction"] < 0.5
    grey = survival(shots, lambda video: video.mean(1, keepdim=True).expand_as(video))
    assert grey["colour"] == 0.0
    soft = survival(shots, lambda video: F.interpolate(F.avg_pool3d(video, (1, 16, 16)), video.shape[2:]))
    assert soft["object_class"] < 1.0
    check_gate("vae", whole, {"object_class": 0.9}, "x")
    with pytest.raises(GateError, match=r"vqvae fine: .*direction \d+% \(needed: 90%\); train longer"):
        check_gate("vqvae fine", frozen, {"direction": 0.9, "colour": 0.5}, "train longer")


def test_random_weights_pass_no_gate_and_a_gate_of_zero_is_none(tmp_path: Path) -> None:
    config = small_config("gates.scenes=4", "gates.codec_motion=0.01", "gates.ar_motion=0.9", "sampling.steps=1")
    parts, gates = make_random_parts(tmp_path, config), Gates(config)
    assert len(gates.scenes) == 4
    with pytest.raises(GateError, match=r"vae: .*object_class 0%"):
        check_codec(gates, parts["vae"], parts["codec_fine"])
    torch.manual_seed(0)
    with pytest.raises(GateError, match=r"ar: .*direction"):
        check_ar(gates, parts["vae"], parts["codec_fine"], parts["ar"])
    off = Gates(small_config("gates.vae_shape=0", "gates.codec_motion=0", "gates.ar_motion=0", "gates.scenes=1"))
    check_codec(off, parts["vae"], parts["codec_fine"])
    check_ar(off, parts["vae"], parts["codec_fine"], parts["ar"])
