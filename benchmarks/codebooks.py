"""Ways to learn the codebook of the fine codec, side by side: error, use, perplexity, steadiness, what survives.

`python -m benchmarks.codebooks --dataset DIR --vae DIR --steps 500 --output benchmarks/results/codebooks.json`

`--bundle DIR` trains none: how much of a bundle's own codebooks held-out scenes use. 64 of them are too few, with 2,560
coarse tokens: `--bundle weights/tiny --scenes 2000 --output benchmarks/results/codebook_use.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import Config, load_config
from arlon_ray.evaluation.gates import survival, through_vae
from arlon_ray.evaluation.tokens import codec_figures
from arlon_ray.models.codec import load_codec
from arlon_ray.models.vae import load_vae, to_video
from arlon_ray.training.loop import train_locally
from benchmarks.machine import machine
from data_pipeline.synthetic import render
from data_pipeline.worlds import held_out_scenes
from jobs.stage_runs import build_codec, check_dataset

SCENES = 48
CODEC = "vqvae.fine"
KINDS = {
    "ema": [],
    "cosine": [f"{CODEC}.metric=cosine"],
    "rotation": [f"{CODEC}.quantizer=rotation"],
    "fsq 8·8·8": [f"{CODEC}.quantizer=fsq", f"{CODEC}.code_dim=3"],
    "ema, 2,048 codes": [f"{CODEC}.codebook_size=2048"],
    "ema, encoder sees neighbours": [f"{CODEC}.encoder_kernel=3"],
}


def measure(config: Config, dataset: Path, vae_path: Path, scenes: int) -> dict[str, float]:
    """Train one codec; figures of held-out clips and of rendered scenes."""
    parents = check_dataset(dataset, vae_path)
    stage = build_codec(config, "fine", dataset, vae_path, parents)
    vae, begin = load_vae(vae_path), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train_locally(stage, Path(folder) / "codec")
        seconds = time.perf_counter() - begin
        codec = load_codec(Path(folder) / "codec")
    shots = [(scene.shots[0], render(scene)) for scene in islice(held_out_scenes(config, "benchmark"), scenes)]
    kept = survival(shots, through_vae(vae, codec))
    with torch.no_grad():
        tokens = [codec.encode(batch["latents"]) for batch in stage.source.held_out_batches(32)]  # type: ignore[attr-defined]
    same = [(part[:, 1:] == part[:, :-1]).float().mean() for part in tokens]
    assert result.artifact is not None
    return {
        **result.artifact.lineage.metrics,
        "equal_to_the_frame_before": float(torch.stack(same).mean()),
        **{f"kept_{name}": share for name, share in kept.items()},
        "seconds": seconds,
    }


@torch.no_grad()
def used(bundle: Bundle, scenes: int) -> dict[str, dict[str, float]]:
    """Use and perplexity of both codebooks, and the codecs' relative errors, on rendered held-out scenes."""
    found = {}
    latents = [
        bundle.vae.encode(to_video(render(scene)[None]))
        for scene in islice(held_out_scenes(bundle.config, "benchmark"), scenes)
    ]
    for role in ("fine", "coarse"):
        codec = load_codec(bundle.path / "vqvae" / role)
        found[role] = codec_figures(codec, latents, [codec.encode(part) for part in latents])
        found[role]["codes"] = len(codec.codebook)
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    names = ["relative_error", "codebook_used", "codebook_perplexity", "equal_to_the_frame_before", "kept_object_class",
             "kept_direction", "seconds"]  # fmt: skip
    lines = [f"| codebook | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    lines += [f"| {kind} | {' | '.join(f'{row[name]:.3g}' for name in names)} |" for kind, row in found.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__)
    measured = flags.add_mutually_exclusive_group(required=True)
    measured.add_argument("--dataset", type=Path)
    measured.add_argument("--bundle", type=Path)
    flags.add_argument("--vae", default=Path("weights/tiny/vae"), type=Path)
    flags.add_argument("--steps", type=int, default=500)
    flags.add_argument("--scenes", type=int, default=SCENES)
    flags.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    flags.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    flags.add_argument("--output", type=Path, default=Path("runs/codebooks.json"))
    options = flags.parse_args(arguments)
    if options.bundle:
        return _written(
            options.output, {"scenes": options.scenes, "used": used(load_bundle(options.bundle), options.scenes)}
        )
    common = [f"vae.init={options.vae}", f"{CODEC}.training.steps={options.steps}", *options.overrides]
    found = {}
    for kind in options.kinds:
        config = load_config("tiny", [*common, *KINDS[kind]])
        found[kind] = measure(config, options.dataset, options.vae, options.scenes)
        print(f"{kind}: {found[kind]}", flush=True)
    print(f"\n{table(found)}\n")
    return _written(options.output, {"steps": options.steps, "codebooks": found})


def _written(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    result = {"machine": machine(), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{json.dumps(found, indent=2)}\n{path}")
    return result


if __name__ == "__main__":
    main()
