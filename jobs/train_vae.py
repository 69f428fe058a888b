"""Train the small video VAE on videos: `python jobs/train_vae.py --input SCENES=0.8 --input FOOTAGE=0.2`."""

from __future__ import annotations

from jobs.command_line import InputError, collection, output_folder, parser, read_config, run
from jobs.memory_plan import add_dry_run, planning, print_plan
from jobs.stage_runs import report, run_vae
from jobs.tracking import Tracking


def weighted_folder(text: str) -> tuple[str, float]:
    """ "FOLDER" or "FOLDER=WEIGHT". Raises InputError."""
    folder, separator, weight = text.rpartition("=")
    if not separator:
        return collection(text, "--input"), 1.0
    try:
        value = float(weight)
    except ValueError:
        if "?" in folder:  # the end of a URI's options, not a weight
            return collection(text, "--input"), 1.0
        raise InputError(f"--input {text}: {weight!r} is not a weight; expected FOLDER or FOLDER=WEIGHT") from None
    if value <= 0:
        raise InputError(f"--input {text}: the weight must be above 0")
    return collection(folder, "--input"), value


def main() -> None:
    """Command line."""
    flags = parser("Train the small video VAE.", output="runs/vae")
    flags.add_argument(
        "--input", action="append", required=not planning(), metavar="INPUT[=WEIGHT]", help="videos; repeatable"
    )
    add_dry_run(flags)
    arguments = flags.parse_args()
    config = read_config(arguments)
    if arguments.dry_run:
        print_plan(config, "vae", arguments.memory_gib)
        return
    inputs = [weighted_folder(text) for text in arguments.input]
    output = output_folder(arguments)
    outcome = run_vae(config, inputs, output / "vae", Tracking(config, output))
    report(outcome)


if __name__ == "__main__":
    run(main)
