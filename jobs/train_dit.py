"""Train the DiT: `python jobs/train_dit.py --dataset DIR --codec-fine DIR --codec-coarse DIR`.

With `--set dit.injection.enabled=false` it is the text-only baseline, which needs neither tokens nor codecs;
`--set dit.init=DIR` starts from an artefact, a text-only one included.
"""

from __future__ import annotations

from jobs.command_line import InputError, existing, output_folder, parser, read_config, run, vae_folder
from jobs.memory_plan import add_dry_run, planning, print_plan
from jobs.stage_runs import report, run_dit
from jobs.tracking import Tracking


def main() -> None:
    """Command line."""
    flags = parser("Train the diffusion transformer.", output="runs/dit")
    flags.add_argument("--dataset", required=not planning(), metavar="DIR", help="latents, by jobs/preprocess.py")
    flags.add_argument("--tokens", metavar="DIR", help="tokens, by jobs/extract_tokens.py (default: DATASET/tokens)")
    flags.add_argument("--codec-fine", metavar="DIR", help="the codec that made the fine tokens")
    flags.add_argument("--codec-coarse", metavar="DIR", help="the codec that made the coarse tokens")
    flags.add_argument("--ar", metavar="DIR", help="the AR whose tokens dit.ar_token_probability asks for")
    flags.add_argument("--vae", metavar="DIR", help="VAE artefact (default: vae.init)")
    add_dry_run(flags)
    arguments = flags.parse_args()
    config = read_config(arguments)
    if arguments.dry_run:
        print_plan(config, "dit", arguments.memory_gib)
        return
    dataset = existing(arguments.dataset, "--dataset")
    vae = vae_folder(arguments.vae, config)
    tokens = codecs = None
    if config.dit.injection.enabled:
        if not arguments.codec_fine or not arguments.codec_coarse:
            raise InputError("--codec-fine and --codec-coarse are needed; or --set dit.injection.enabled=false")
        tokens = existing(arguments.tokens or str(dataset / "tokens"), "--tokens")
        codecs = (existing(arguments.codec_fine, "--codec-fine"), existing(arguments.codec_coarse, "--codec-coarse"))
    output = output_folder(arguments)
    name = "dit" if config.dit.injection.enabled else "dit_base"
    ar = existing(arguments.ar, "--ar") if arguments.ar else None
    report(run_dit(config, dataset, vae, output / name, tokens, codecs, Tracking(config, output), ar))


if __name__ == "__main__":
    run(main)
