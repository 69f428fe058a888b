"""Train every stage on rendered scenes in one process, within a time budget, and measure the bundle: for a lent GPU.

`python -m benchmarks.train_box --minutes 9 --device cuda --output DIR` needs torch, einops, pydantic, safetensors and
the text encoder (MiniLM's package on PYTHONPATH), but neither Ray nor DeepSpeed nor a file of footage: the stages are
those of `jobs/`, the scenes are rendered into memory. `--set` takes any setting: larger models, `sample_grade=rich`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arlon_ray.bundle import Bundle, save_bundle
from arlon_ray.config import GROUP_FRAMES, Config, load_config
from arlon_ray.models.codec import load_codec
from arlon_ray.models.text import load_text_encoder
from arlon_ray.models.vae import load_vae
from arlon_ray.training.engine import Stage, TorchEngine, derived_seed
from arlon_ray.training.loop import train_locally
from arlon_ray.training.stages.ar import ArPaths, ArStage
from arlon_ray.training.stages.codec import CodecStage
from arlon_ray.training.stages.dit import DitPaths, DitStage, text_only
from arlon_ray.training.stages.vae import VaeStage, to_video
from benchmarks.machine import machine
from data_pipeline.synthetic import render
from data_pipeline.worlds import caption, training_seed, whole_scenes
from jobs.evaluation import Evaluator, held_out_prompts, parse_row, table_of

#: Shares of the time for training; the rest is for rendering, encoding and measuring.
SHARES = {"vae": 0.12, "vqvae_fine": 0.05, "vqvae_coarse": 0.03, "ar": 0.2, "dit_base": 0.2, "dit": 0.25}
PROBED, SEED = 8, 3
ROWS = ("truth", "vae", "text-only@30", "text-only@5", "guided@5", "true-tokens@5")


class PixelScenes:
    """17-frame groups of rendered scenes, for the VAE."""

    def __init__(self, config: Config, count: int) -> None:
        self.groups = np.concatenate(
            [
                render(s).reshape(-1, GROUP_FRAMES, *_size(config), 3)
                for s in islice(whole_scenes(config, training_seed(SEED, 0)), count)
            ]
        )
        self.kept = max(1, len(self.groups) // 20)

    def training(self, seed: int, count: int) -> np.ndarray:
        """See GroupSource."""
        return self.groups[self.kept + np.random.default_rng(seed).integers(len(self.groups) - self.kept, size=count)]

    def held_out(self, count: int) -> np.ndarray:
        """See GroupSource."""
        return self.groups[: min(count, self.kept)]


class LatentScenes:
    """Latents, text and tokens of rendered scenes in memory: a BatchSource."""

    def __init__(self, config: Config, count: int, vae_path: Path, device: str) -> None:
        vae, text = load_vae(vae_path, device), load_text_encoder(config.text, device)
        self.drawn = list(islice(whole_scenes(config, training_seed(SEED, 0)), count))
        self.text_identity, self.config = text.identity, config
        self.batch_size, self.latents, self.texts, self.masks = 0, [], [], []
        for first in range(0, count, 64):
            part = self.drawn[first : first + 64]
            self.latents.append(vae.encode(to_video(np.stack([render(s) for s in part])).to(device)).half().cpu())
            encoded = [text.encode([caption(scene)]) for scene in part]
            width = config.text.max_tokens
            for values, mask in encoded:
                room = width - values.shape[1]
                self.texts.append(torch.nn.functional.pad(values, (0, 0, 0, room)).half().cpu())
                self.masks.append(torch.nn.functional.pad(mask, (0, room)).cpu())
        self.values = {"latents": torch.cat(self.latents), "text": torch.cat(self.texts)}
        self.mask, self.tokens = torch.cat(self.masks), dict[str, Tensor]()
        self.kept = max(1, count // 50)

    def tokenise(self, role: str, path: Path, device: str) -> None:
        """Add the tokens of a codec."""
        codec = load_codec(path, device)
        parts = [codec.encode(part.float().to(device)).cpu() for part in self.values["latents"].split(256)]
        self.tokens[f"tokens_{role}"] = torch.cat(parts)

    def sized(self, batch_size: int) -> LatentScenes:
        """This source with batches of so many."""
        self.batch_size = batch_size
        return self

    def batch(self, step: int, rank: int, world: int) -> dict[str, Any]:
        """See BatchSource."""
        random = np.random.default_rng(derived_seed(SEED, step, rank))
        return self._gather(self.kept + random.integers(len(self.mask) - self.kept, size=self.batch_size // world))

    def held_out_batches(self, batch_size: int) -> Iterator[dict[str, Any]]:
        """See BatchSource."""
        for rows in np.array_split(np.arange(self.kept), -(-self.kept // batch_size)):
            yield self._gather(rows)

    def _gather(self, rows: np.ndarray) -> dict[str, Any]:
        chosen = torch.from_numpy(rows)
        return {
            **{name: value[chosen].float() for name, value in self.values.items()},
            **{name: value[chosen] for name, value in self.tokens.items()},
            "text_mask": self.mask[chosen],
            "clip_id": chosen,
            "fps": torch.full((len(rows),), self.config.video.fps),
            "caption": [caption(self.drawn[int(row)]) for row in rows],
        }


def steps_within(stage: Stage, device: str, seconds: float) -> int:
    """How many steps fit: from the median of a few, on weights that are thrown away."""
    engine, times = TorchEngine(stage, device), []
    generator = torch.Generator(device=engine.device)
    for step in range(PROBED):
        begin = time.perf_counter()
        engine.step(stage.batch(step, 0, 1), generator, 1.0)  # its loss is read: the device has ended
        times.append(time.perf_counter() - begin)
    return max(1, int(seconds / float(np.median(times[2:]))))


def train_box(config: Config, output: Path, device: str, minutes: float, count: int) -> Bundle:
    """Every stage in its share of the time."""
    paths = {name: output / name for name in ("vae", "codec_fine", "codec_coarse", "ar", "dit_base", "dit")}

    def trained(name: str, path: Path, build: Callable[[Config], Stage], section: str) -> str:
        """Build, probe, train; the artefact's fingerprint."""
        steps = steps_within(build(config), device, SHARES[name] * minutes * 60)
        keys = section.split(".")
        changed = _with_steps(config, keys, steps)
        result = train_locally(build(changed), path, device=device)
        assert result.artifact is not None
        return result.artifact.fingerprint

    pixels = PixelScenes(config, min(count, 2000))
    fingerprints = {"vae": trained("vae", paths["vae"], lambda c: VaeStage(c.vae, pixels, c.seed), "vae")}
    source = LatentScenes(config, count, paths["vae"], device)
    common = {"vae": fingerprints["vae"], "text": source.text_identity}
    for role in ("fine", "coarse"):

        def codec(c: Config, role: Any = role) -> Stage:
            settings = getattr(c.vqvae, role)
            latents = source.sized(settings.training.batch_size)
            return CodecStage(settings, role, c.vae.latent_channels, latents, paths["vae"], dict(common), c.seed)

        path = paths[f"codec_{role}"]
        fingerprints[f"codec_{role}"] = trained(f"vqvae_{role}", path, codec, f"vqvae.{role}")
        source.tokenise(role, path, device)
    parents = {**common, **fingerprints}

    def ar(c: Config) -> Stage:
        return ArStage(c, source.sized(c.ar.training.batch_size), ArPaths(paths["codec_fine"], paths["vae"]), parents)

    def base(c: Config) -> Stage:
        latents = source.sized(c.dit.training.batch_size)
        return DitStage(text_only(c, c.dit.training.steps), latents, DitPaths(paths["vae"]), parents)

    def guided(c: Config) -> Stage:
        started = c.model_copy(update={"dit": c.dit.model_copy(update={"init": str(paths["dit_base"])})})
        codecs = DitPaths(paths["vae"], paths["codec_fine"], paths["codec_coarse"])
        return DitStage(started, source.sized(c.dit.training.batch_size), codecs, parents)

    trained("ar", paths["ar"], ar, "ar")
    trained("dit_base", paths["dit_base"], base, "dit")
    trained("dit", paths["dit"], guided, "dit")
    return Bundle(save_bundle(output / "bundle", config, paths, source.text_identity), device)


def _with_steps(config: Config, keys: list[str], steps: int) -> Config:
    """The configuration with `<keys>.training.steps`, and no checkpoints within the run."""
    raw = config.model_dump(mode="json")
    section = raw
    for key in keys:
        section = section[key]
    section["training"] |= {"steps": steps, "checkpoint_every": steps, "log_every": max(1, steps // 10)}
    return Config.model_validate(raw)


def _size(config: Config) -> tuple[int, int]:
    return config.video.height, config.video.width


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", default="tiny")
    flags.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    flags.add_argument("--minutes", type=float, default=9.0, help="time for training")
    flags.add_argument("--videos", type=int, default=6000)
    flags.add_argument("--count", type=int, default=64, help="held-out captions to measure on")
    flags.add_argument("--rows", nargs="+", default=list(ROWS))
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--output", type=Path, default=Path("runs/box"))
    options = flags.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        flags.error("--device cuda: there is no GPU here")
    config = load_config(options.config, options.overrides)
    begin = time.perf_counter()
    bundle = train_box(config, options.output, options.device, options.minutes, options.videos)
    trained = time.perf_counter() - begin
    evaluator = Evaluator(bundle, held_out_prompts(bundle, options.count), 0)
    results = [evaluator.row(parse_row(row)) for row in options.rows]
    print(f"\n{table_of(results)}\n")
    found = {
        "machine": machine(),
        "minutes": trained / 60,
        "held_out": {name: dict(artifact.lineage.metrics) for name, artifact in bundle.artifacts.items()},
        "rows": {result.row.name: result.report() for result in results},
    }
    (options.output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(options.output / "results.json")
    return found


if __name__ == "__main__":
    main()
