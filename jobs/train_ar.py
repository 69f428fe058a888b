"""Train the autoregressive transformer: `python jobs/train_ar.py --dataset DIR --codec-fine DIR`."""

from __future__ import annotations

from jobs.command_line import existing, output_folder, parser, read_config, run, vae_folder
from jobs.memory_plan import add_dry_run, planning, print_plan
from jobs.stage_runs import report, run_ar
from jobs.tracking import Tracking


def main() -> None:
    """Command line."""
    flags = parser("Train the autoregressive transformer.", output="runs/ar")
    flags.add_argument("--dataset", required=not planning(), metavar="DIR", help="latents, by jobs/preprocess.py")
    flags.add_argument("--tokens", metavar="DIR", help="tokens, by jobs/extract_tokens.py (default: DATASET/tokens)")
    flags.add_argument(
        "--codec-fine", required=not planning(), metavar="DIR", help="the codec that made the fine tokens"
    )
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init)")
    add_dry_run(flags)
    arguments = flags.parse_args()
    config = read_config(arguments)
    if arguments.dry_run:
        print_plan(config, "ar", arguments.memory_gib)
        return
    dataset = existing(arguments.dataset, "--dataset")
    tokens = existing(arguments.tokens or str(dataset / "tokens"), "--tokens")
    codec = existing(arguments.codec_fine, "--codec-fine")
    vae = vae_folder(arguments.vae, config)
    output = output_folder(arguments)
    report(run_ar(config, dataset, tokens, vae, codec, output / "ar", Tracking(config, output)))


if __name__ == "__main__":
    run(main)
