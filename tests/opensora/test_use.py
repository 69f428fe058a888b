"""What is imported is used by the same code as everything else: in the data pipeline, in training, in serving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from arlon_ray.artifact import ArtifactError, load_artifact, save_artifact
from arlon_ray.bundle import load_bundle
from arlon_ray.config import override
from arlon_ray.generation import VideoGenerator
from arlon_ray.generation.video import contact_sheet, read_video, write_video
from arlon_ray.models.codec import LatentCodec
from arlon_ray.training.loop import train_locally
from arlon_ray.training.stages.dit import DitPaths, DitStage, initial_dit
from data_pipeline.encode import ClipEncoder
from data_pipeline.schema import DECODED
from jobs.command_line import InputError
from jobs.stage_runs import _fitting_start
from tests.data_pipeline.test_encode import decoded
from tests.opensora.public import make_public_bundle, randomized, small_config, write_stdit
from tests.scripts import run_script
from tests.training.recording import Recorder
from tests.training.sources import ToySource


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job makes of public checkpoints of small sizes."""
    return make_public_bundle(tmp_path_factory.mktemp("imported"))


def test_the_data_pipeline_computes_the_embeddings_and_latents_that_serving_computes(bundle: Path) -> None:
    opened = load_bundle(bundle)
    caption = "A RED circle <b>moves</b> slowly to the left, www.example.com"
    encoder = ClipEncoder(bundle / "vae", opened.config.text)
    row = encoder(pa.Table.from_pylist([decoded(1, 34, caption)], schema=DECODED)).to_pylist()[0]
    seen: list[str] = []
    encode = opened.text.encode
    opened.text.encode = lambda captions: (seen.extend(captions), encode(captions))[1]  # type: ignore[method-assign]
    next(VideoGenerator(opened).generate([caption], seed=0))
    served = encode(seen[:1])
    length = int(served.mask.sum())
    stored = np.frombuffer(row["text_embedding"], np.float16).reshape(length, 16)
    assert row["reason"] == "" and row["text_length"] == length
    assert np.array_equal(stored, served.values[0, :length].half().numpy())
    assert encoder.text.identity == opened.text_identity
    pixels = torch.frombuffer(bytearray(decoded(1, 34)["frames"]), dtype=torch.uint8).view(1, 34, 16, 16, 3)
    latents = opened.vae.encode(pixels.permute(0, 4, 1, 2, 3).float() / 127.5 - 1)
    assert row["latent_shape"] == [4, 10, 2, 2]
    assert np.array_equal(np.frombuffer(row["latent"], np.float16), latents.half().flatten().numpy())


@pytest.mark.parametrize("train_only", ["injection", "all"])
def test_training_starts_from_it_and_says_how_many_parameters_train(
    bundle: Path, tmp_path: Path, train_only: str
) -> None:
    quick = ("steps=3", "batch_size=4", "held_out=4", "warmup_steps=1", "learning_rate=0.01", "ema_decay=0")
    config = override(
        small_config(),
        [f"dit.init={bundle}", f"dit.train_only={train_only}", *(f"dit.training.{setting}" for setting in quick)],
    )
    codecs = []
    for i, codec in enumerate((config.vqvae.fine, config.vqvae.coarse)):
        settings = {**codec.model_dump(mode="json"), "latent_channels": 4}
        state = randomized(LatentCodec(codec, 4), i)
        codecs.append(save_artifact(tmp_path / f"codec{i}", kind="codec", config=settings, tensors=state).path)
    recorder, paths = Recorder(), DitPaths(bundle / "vae", *codecs)
    stage = DitStage(config, ToySource(config, 4), paths, {"vae": "v"})
    artifact = train_locally(stage, tmp_path / "dit", reporter=recorder).artifact
    assert artifact is not None
    before = load_file(bundle / "dit_base" / "model.safetensors")
    after = artifact.tensors()
    assert not torch.equal(after["injection.layers.0.out.bias"], torch.zeros_like(after["injection.layers.0.out.bias"]))
    kept = [name for name in before if torch.equal(before[name], after[name])]
    assert len(kept) == len(before) if train_only == "injection" else len(kept) < len(before) / 2
    added = sum(value.numel() for name, value in after.items() if name.startswith("injection."))
    trained = added if train_only == "injection" else added + sum(
        value.numel() for name, value in before.items() if name not in ("rope.freqs", "y_embedder.y_embedding")
    )  # fmt: skip
    assert recorder.lines[0].startswith(f"dit: {trained:,} parameters train, ")


def test_what_dit_init_may_name(bundle: Path, tmp_path: Path) -> None:
    base = load_artifact(bundle / "dit_base", "dit").fingerprint
    assert initial_dit(bundle).fingerprint == initial_dit(bundle / "dit_base").fingerprint == base
    with pytest.raises(ArtifactError, match="public weights become one by jobs/import_opensora"):
        initial_dit(write_stdit(tmp_path / "public"))


def test_pictures_and_clips_start_a_text_only_video(bundle: Path, tmp_path: Path) -> None:
    contact_sheet(tmp_path / "first.png", np.full((1, 80, 80, 3), 200, np.uint8))
    write_video(tmp_path / "clip.mp4", np.full((40, 64, 64, 3), 90, np.uint8), 16)

    def made(name: str, *start: str) -> np.ndarray:
        flags = ["--bundle", str(bundle), "--prompt", "a red circle", "--output", str(tmp_path / name)]
        result = run_script("generate", *flags, *start)
        assert result.returncode == 0, result.stderr
        return read_video(tmp_path / name)

    free, picture = made("free.mp4"), made("picture.mp4", "--image", str(tmp_path / "first.png"))
    assert free.shape == picture.shape == (34, 64, 64, 3) and not np.array_equal(free, picture)
    clip = made("clip-on.mp4", "--video", str(tmp_path / "clip.mp4"))
    assert clip.shape == (40 + 17, 64, 64, 3) and np.abs(clip[:40].astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
    "settings, message",
    [
        (["dit.depth=3"], "depth=2, but dit.depth=3 here"),
        (["dit.input_sq_size=256"], "input_sq_size=512"),
        (["dit.temporal_attention=joint"], "temporal_attention=temporal"),
        ([], "of VAE"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_starts(
    bundle: Path, settings: list[str], message: str
) -> None:
    config = override(small_config(), [f"dit.init={bundle}", *settings])
    with pytest.raises(InputError, match=message):
        _fitting_start(config, {"vae": "another", "text": "t5:x"})
