"""Train the fine and the coarse latent VQ-VAE: `python jobs/train_vqvae.py --dataset DIR`."""

from __future__ import annotations

from typing import cast

from jobs.command_line import existing, output_folder, parser, read_config, run, vae_folder
from jobs.memory_plan import add_dry_run, planning, print_plan
from jobs.ray_session import connect
from jobs.stage_runs import Role, check_dataset, report, run_codec
from jobs.tracking import Tracking


def main() -> None:
    """Command line."""
    flags = parser("Train the latent VQ-VAEs.", output="runs/vqvae")
    flags.add_argument("--dataset", required=not planning(), metavar="DIR", help="latents, by jobs/preprocess.py")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init)")
    flags.add_argument("--role", choices=("fine", "coarse", "both"), default="both")
    add_dry_run(flags)
    arguments = flags.parse_args()
    config = read_config(arguments)
    roles = ("fine", "coarse") if arguments.role == "both" else (arguments.role,)
    if arguments.dry_run:
        for role in roles:
            print_plan(config, f"vqvae_{role}", arguments.memory_gib)
        return
    dataset = existing(arguments.dataset, "--dataset")
    vae = vae_folder(arguments.vae, config)
    check_dataset(dataset, vae)
    output = output_folder(arguments)
    tracking = Tracking(config, output)
    with connect(config):
        for role in roles:
            report(run_codec(config, cast(Role, role), dataset, vae, output / f"codec_{role}", tracking))


if __name__ == "__main__":
    run(main)
