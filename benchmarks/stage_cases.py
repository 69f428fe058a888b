"""The stages that `benchmarks.stages` measures: each at several sizes, and one or two that the fit does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, Config, load_config
from arlon_ray.generation.guidance import guided_velocity
from arlon_ray.generation.options import default_options
from arlon_ray.generation.sampling import Sampling, SamplingBatch
from arlon_ray.generation.video import encode_fragment
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.text import load_text_encoder
from arlon_ray.models.vae import build_vae
from arlon_ray.planning import counts, media, training
from arlon_ray.planning.counts import Work
from arlon_ray.training.memory import probe_of, training_of
from arlon_ray.training.optimizer import build_optimizers, parameter_groups
from data_pipeline.decode import Decoder
from data_pipeline.synthetic import render, write_mp4
from data_pipeline.worlds import sample_scene
from jobs.command_line import InputError

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One size of a stage: what it is counted as, and what does it."""

    name: str
    work: Work
    run: Run
    held_out: bool = False


#: Settings of each case; the last ones of a stage are held out.
DIT = (
    "dit.hidden_size=128 dit.num_heads=4 video.height=64 video.width=64 segment.groups=2",
    "dit.hidden_size=128 dit.num_heads=4 video.height=128 video.width=128 segment.groups=2",
    "dit.hidden_size=256 dit.num_heads=8 video.height=64 video.width=64 segment.groups=4 "
    "dit.temporal_attention=temporal",
    "dit.hidden_size=256 dit.num_heads=4 video.height=128 video.width=128 segment.groups=3 dit.depth=2",
    "dit.hidden_size=384 dit.num_heads=6 video.height=64 video.width=96 segment.groups=2",
    "dit.hidden_size=512 dit.num_heads=8 video.height=96 video.width=96 segment.groups=2 dit.depth=2",
    "dit.hidden_size=768 dit.num_heads=12 video.height=64 video.width=64 segment.groups=2 dit.depth=2",
    "dit.hidden_size=192 dit.num_heads=6 video.height=64 video.width=64 segment.groups=2 dit.depth=6",
    "dit.hidden_size=320 dit.num_heads=8 video.height=96 video.width=96 segment.groups=3 dit.depth=4 "
    "dit.temporal_attention=temporal",
    "dit.hidden_size=640 dit.num_heads=10 video.height=96 video.width=64 segment.groups=2 dit.depth=3",
)
AR = (
    "ar.dim=192 ar.heads=4 ar.layers=4 ar.block=[2,4]",
    "ar.dim=192 ar.heads=4 ar.layers=4 ar.block=[1,1]",
    "ar.dim=192 ar.heads=4 ar.layers=8 ar.block=[2,2] sampling.ar_guidance_scale=1.0",
    "ar.dim=384 ar.heads=6 ar.layers=6 ar.block=[2,2]",
    "ar.dim=384 ar.heads=6 ar.layers=6 ar.block=[1,1] vqvae.fine.codebook_size=2048",
    "ar.dim=640 ar.heads=10 ar.layers=8 ar.block=[2,4] sampling.ar_guidance_scale=1.0",
    "ar.dim=640 ar.heads=10 ar.layers=6 ar.block=[4,4] vqvae.fine.codebook_size=2048",
    "ar.dim=768 ar.heads=12 ar.layers=6 ar.block=[2,2]",
    "ar.dim=256 ar.heads=4 ar.layers=6 ar.block=[2,4] vqvae.fine.codebook_size=1024",
    "ar.dim=512 ar.heads=8 ar.layers=8 ar.block=[2,2] segment.groups=3",
)
VAE = (
    "vae.width=96 vae.deep_width=160 video.height=64 video.width=64",
    "vae.width=96 vae.deep_width=160 video.height=128 video.width=128",
    "vae.width=64 vae.deep_width=96 video.height=96 video.width=96",
    "vae.width=160 vae.deep_width=320 video.height=64 video.width=96",
    "vae.width=128 vae.deep_width=192 vae.blocks=2 video.height=128 video.width=96",
    "vae.width=48 vae.deep_width=64 video.height=128 video.width=128",
    "vae.width=160 vae.deep_width=320 video.height=128 video.width=128",
    "vae.width=112 vae.deep_width=224 video.height=96 video.width=128",
)
CODEC = (
    "vqvae.fine.width=64",
    "vqvae.fine.width=128 vqvae.fine.encoder_kernel=3 vqvae.fine.codebook_size=2048",
    "vqvae.fine.width=64 video.height=128 video.width=128",
    "vqvae.fine.width=128 vqvae.fine.encoder_kernel=3 vqvae.fine.blocks=3 video.height=128 video.width=128",
    "vqvae.fine.width=256 vqvae.fine.encoder_kernel=3 vqvae.fine.codebook_size=1024",
    "vqvae.fine.width=192 vqvae.fine.encoder_kernel=3 video.height=96 video.width=128",
    "vqvae.fine.width=96 vqvae.fine.encoder_kernel=3 vqvae.fine.blocks=3 video.height=96 video.width=96",
    "vqvae.fine.width=160 vqvae.fine.encoder_kernel=3 vqvae.fine.codebook_size=2048 video.height=96 video.width=96",
)
TEXT = tuple(f"text.layers={layers}" for layers in (1, 2, 4, 6, 3))
CAPTIONS = (
    "a red circle moves to the right",
    "a large green square and a small blue triangle move apart, slowly, on grey",
)
#: (height, width) of the file, seconds of the clip, side of its frames, whether held out.
FILES = (
    (64, 64, 2.2, 64), (128, 128, 2.2, 64), (256, 256, 2.2, 64), (256, 384, 4.3, 64), (480, 640, 2.2, 128),
    (128, 128, 4.3, 128), (360, 480, 4.3, 128), (240, 320, 3.2, 96),
)  # fmt: skip
#: Samples of a step of training.
SAMPLES = 1


def config_of(settings: str) -> Config:
    return load_config("tiny", ["data.bucket_groups=[2,3,4]", *settings.split()])


def cases(stage: str, folder: Path, device: str) -> list[Case]:
    """All cases of `stage`, built. Raises InputError for a stage that there is not."""
    if stage not in STAGES:
        raise InputError(f"--stages {stage}: expected some of {', '.join(STAGES)}")
    all_settings, build, held_out = STAGES[stage]
    with torch.device(device):
        return [
            Case(str(settings), *build(settings, folder), held_out=number >= len(all_settings) - held_out)
            for number, settings in enumerate(all_settings)
        ]


Built = tuple[Work, Run]


def _dit_step(settings: str, folder: Path) -> Built:
    """One guided evaluation: what it does at every step, not what is prepared."""
    config = config_of(settings)
    dit, length = _filled(training.stage_model(config, "dit")), 8
    latent = (config.segment.latents, *config.latent_grid)
    coarse = torch.randn(1, config.dit.in_channels, *latent)
    text = torch.randn(1, length, config.text.dim), torch.ones(1, length, dtype=torch.bool)
    size = (config.video.height, config.video.width)
    field = guided_velocity(dit, latent, text, coarse, None, config.video.fps, size, default_options(config.sampling))
    grid = counts.dit_grid(config, config.segment.groups)
    work = counts.dit_forward(config.dit, *grid, length, counts.branches(config))
    moment = torch.full((1,), 500.0)
    return work, lambda: field(coarse, moment)


def _train(stage: str) -> Callable[[str, Path], Built]:
    def build(settings: str, folder: Path) -> Built:
        """Forward, backward and the stage's own optimizers, on inputs of nothing in particular."""
        config = config_of(settings)
        probe = probe_of(config, stage, SAMPLES)
        optimizers = build_optimizers(parameter_groups(probe.model, training_of(config, stage)))

        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

        def run() -> None:
            probe.loss().backward()
            # the inputs are whatever lay in memory; Muon would leave out what is not finite
            for parameter in probe.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return training.batch_work(config, stage, SAMPLES) + training.optimizer_work(config, stage), run

    return build


def _ar_segment(settings: str, folder: Path) -> Built:
    """The tokens of a segment in the middle of a video: context, then step by step."""
    config = config_of(settings)
    ar, length = _filled(training.stage_model(config, "ar")), 8
    known = config.ar_window_groups - config.segment.groups + config.segment.overlap_groups
    grid = config.token_grid(config.vqvae.fine, config.ar_window_groups)
    context = torch.zeros(config.token_grid(config.vqvae.fine, known), dtype=torch.long)
    text = torch.randn(1, length, config.text.dim), torch.ones(1, length, dtype=torch.bool)
    options, blocks = default_options(config.sampling), counts.ar_blocks(config, config.ar_window_groups)
    batch = SamplingBatch(ar, length + blocks)

    def run() -> None:
        sampling = Sampling(text, context, grid, options, torch.Generator(ar.start.device).manual_seed(0))
        batch.join(sampling)
        while not sampling.ended:
            batch.step()
        assert sampling.result.shape == grid

    return counts.ar_segment(config, length).all, run


def _vae(encode: bool) -> Callable[[str, Path], Built]:
    def build(settings: str, folder: Path) -> Built:
        config, groups = config_of(settings), 2
        vae = _filled(build_vae(config.vae))
        frames = torch.randn(1, 3, groups * GROUP_FRAMES, config.video.height, config.video.width).clamp(-1, 1)
        latents = torch.randn(1, config.vae.latent_channels, groups * GROUP_LATENTS, *config.latent_grid)
        work = counts.vae_group(config, encode) * groups
        return work, (lambda: vae.encode(frames)) if encode else (lambda: vae.decode(latents))

    return build


def _codec(settings: str, folder: Path) -> Built:
    """Latents to tokens and back."""
    config, groups = config_of(settings), 2
    codec = _filled(LatentCodec(config.vqvae.fine, config.vae.latent_channels))
    latents = torch.randn(1, config.vae.latent_channels, groups * GROUP_LATENTS, *config.latent_grid)
    both = counts.codec_group(config, "fine", True) + counts.codec_group(config, "fine", False)
    return both * groups, lambda: codec.decode(codec.encode(latents), config.latent_grid)


def _text(settings: str, folder: Path) -> Built:
    config = config_of(settings)
    encoder = load_text_encoder(config.text, torch.get_default_device())
    work = sum((counts.text_caption(config.text, encoder.count_tokens(text)) for text in CAPTIONS), Work())
    return work, lambda: encoder.encode(CAPTIONS)


def _clip(file: tuple[int, int, float, int], folder: Path) -> Built:
    """A file's only clip: opened, decoded, scaled, scored."""
    height, width, seconds, side = file
    fps = 16.0
    frames = int(seconds * fps) // GROUP_FRAMES * GROUP_FRAMES
    path = folder / f"{height}x{width}-{seconds}-{side}.mp4"
    write_mp4(path, _scene(frames, height, width), fps)
    row = {
        "uri": str(path), "start_s": 0.0, "num_frames": frames, "fps": fps, "height": side, "width": side,
    }  # fmt: skip
    config = config_of("")

    def run() -> None:
        decoded = Decoder(config.data.filters)(row)
        assert not decoded["reason"], decoded["error"]

    return media.clip_work(frames, height * width, frames, side * side), run


def _mp4(file: tuple[int, int, float, int], folder: Path) -> Built:
    """Frames to a fragment of mp4, as a segment leaves the decoder."""
    height, width, seconds, _ = file
    frames = _scene(int(seconds * 16) // GROUP_FRAMES * GROUP_FRAMES, height, width)
    return media.fragment_work(len(frames), height * width), lambda: encode_fragment(frames, 16.0)


def _scene(frames: int, height: int, width: int) -> np.ndarray:
    return render(sample_scene(0, [frames // GROUP_FRAMES], height, width, "simple"))


def _filled(model: Any) -> Any:
    """The model, frozen, with weights of nothing in particular where it has none."""
    device = torch.get_default_device()
    model = model.to_empty(device=device) if any(p.is_meta for p in model.parameters()) else model.to(device)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.02)
        for value in model.buffers():
            value.normal_(0, 1)
    return model.eval().requires_grad_(False)


#: Settings, what builds a case of them, and how many of the last ones are held out.
STAGES: dict[str, tuple[Sequence[Any], Callable[[Any, Path], Built], int]] = {
    "clip": (FILES, _clip, 2),
    "vae_encode": (VAE, _vae(encode=True), 2),
    "text": (TEXT, _text, 1),
    "codec": (CODEC, _codec, 2),
    "train_vae": (VAE[:4] + VAE[5:6] + VAE[-1:], _train("vae"), 1),
    "train_codec": (CODEC, _train("vqvae_fine"), 2),
    "train_ar": (AR[:5] + AR[-2:], _train("ar"), 2),
    "train_dit": (DIT[:5] + DIT[7:9], _train("dit"), 1),
    "ar": (AR, _ar_segment, 2),
    "dit": (DIT, _dit_step, 2),
    "vae_decode": (VAE, _vae(encode=False), 2),
    "mp4": (FILES, _mp4, 2),
}
