"""Put stages that were trained one by one into a bundle that generates, serves and is evaluated.

`python jobs/make_bundle.py --codec-fine DIR --codec-coarse DIR --ar DIR --dit DIR --dit-base DIR --output BUNDLE`

Parts that were not trained on each other are refused. With --dit-base alone the bundle is text-only.
"""

from __future__ import annotations

from arlon_ray import mirror
from arlon_ray.bundle import PARTS, save_bundle
from arlon_ray.models.text import text_identity
from jobs.command_line import InputError, existing, output_folder, parser, read_config, run, vae_folder


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/bundle")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init)")
    for name, what in (
        ("codec-fine", "fine codec"),
        ("codec-coarse", "coarse codec"),
        ("ar", "AR"),
        ("dit", "guided DiT"),
        ("dit-base", "text-only DiT: the baseline"),
    ):
        flags.add_argument(f"--{name}", metavar="DIR", help=what)
    arguments = flags.parse_args()
    config = read_config(arguments)
    given = {name: getattr(arguments, name) for name in PARTS if name != "vae"}
    parts = {name: existing(path, f"--{name.replace('_', '-')}") for name, path in given.items() if path is not None}
    if not parts:
        raise InputError("no parts: expected --codec-fine, --codec-coarse, --ar and --dit, or --dit-base, or all")
    parts["vae"] = vae_folder(arguments.vae, config)
    bundle = save_bundle(output_folder(arguments), config, parts, text_identity(config.text))
    print(mirror.named(str(bundle)))


if __name__ == "__main__":
    run(main)
