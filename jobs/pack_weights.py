"""Write a bundle that is small enough for the repository: AR and DiT in half precision, without the text-only DiT.

`python jobs/pack_weights.py --bundle runs/tiny/bundle --output weights/tiny`

VAE and codecs stay as they are: their fingerprints are what everything else was trained on. Lineage stays, too.
`--precision int8` makes a bundle whose AR and DiT are used with weights of 8 bits: for GPUs with little memory.
`--precision bf16 --vae-precision bf16`: for GPUs, and for CPUs that have bfloat16 (docs/performance.md).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import torch

from arlon_ray.artifact import save_artifact
from arlon_ray.bundle import Bundle, save_bundle
from arlon_ray.precision import Precision, Weights
from jobs.command_line import InputError, existing, parser, run
from jobs.generate import open_bundle

HALVED = ("ar", "dit")
LEFT_OUT = ("dit_base",)
#: The parent of what was halved.
HALF_OF = "full_precision"


def pack(
    bundle: Bundle, output: Path, precision: Weights | None = None, vae_precision: Precision | None = None
) -> Path:
    """Write the small bundle to `output`. What is there besides the bundle's own files (a README) stays.

    `precision`: what its AR and DiT are used in, if not as before; `vae_precision`: its VAE.
    """
    vae = bundle.config.vae.model_copy(update={"precision": vae_precision or bundle.config.vae.precision})
    changes = {"precision": precision or bundle.config.precision, "vae": vae}
    config = bundle.config.model_copy(update=changes)
    keep = {path.name: path.read_bytes() for path in output.glob("*.md")} if output.is_dir() else {}
    with tempfile.TemporaryDirectory(prefix="arlon-pack-") as folder:
        parts = {}
        for name, artifact in bundle.artifacts.items():
            if name in LEFT_OUT:
                continue
            parts[name] = artifact.path
            lineage = artifact.lineage
            if name in HALVED and HALF_OF not in lineage.parents:  # else it is half a one already
                parts[name] = save_artifact(
                    Path(folder) / name,
                    kind=lineage.kind,
                    config=artifact.config,
                    tensors=artifact.tensors(),
                    parents={**lineage.parents, HALF_OF: artifact.fingerprint},
                    metrics=lineage.metrics,
                    key=lineage.key,
                    dtype=torch.float16,
                ).path
        save_bundle(output, config, parts, bundle.text_identity)
    for name, text in keep.items():
        (output / name).write_bytes(text)
    return output


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="weights/tiny", config=False)
    flags.add_argument("--bundle", required=True, metavar="DIR", help="model bundle")
    flags.add_argument("--precision", choices=get_args(Weights), help="of AR and DiT in use (default: as before)")
    flags.add_argument("--vae-precision", choices=get_args(Precision), help="of the VAE in use (default: as before)")
    arguments = flags.parse_args()
    bundle = open_bundle(existing(arguments.bundle, "--bundle"))
    if not bundle.guided:
        raise InputError(f"--bundle {bundle.path}: is text-only; expected a guided bundle")
    output = Path(arguments.output).expanduser().absolute()
    pack(bundle, output, arguments.precision, arguments.vae_precision)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
