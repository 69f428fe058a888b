"""What all jobs share on the command line: the flags, and how bad input and Ctrl-C end."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError, one_line
from arlon_ray.config import Config, ConfigError, load_config, preset_names
from arlon_ray.heap import keep_freed_memory
from arlon_ray.training.loop import StoppedError, TrainingError

#: The bundle in the repository: what is used where no other is named.
BOX = Path(__file__).resolve().parents[1] / "weights" / "tiny"

#: What every layer says of it, whatever the type of its error.
DISK_FULL = os.strerror(errno.ENOSPC)


class InputError(ValueError):
    """Input that a job cannot work with. One line that says what was wrong and what to do."""


def parser(
    description: str, *, output: str, config: bool = True, default_config: str = "tiny"
) -> argparse.ArgumentParser:
    """A parser with the flags that every job has; `output` is the default of --output.

    Without `config` for the jobs that take their configuration from a bundle.
    """
    result = argparse.ArgumentParser(description=description, allow_abbrev=False)
    if config:
        result.add_argument(
            "--config",
            default=default_config,
            metavar="NAME|FILE",
            help=f"preset ({', '.join(preset_names())}) or YAML file (default: {default_config})",
        )
        result.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override, repeatable"
        )
    result.add_argument(
        "--output", default=output, metavar="PATH", help=f"where results go, here or in a bucket (default: {output})"
    )
    return result


def read_config(arguments: argparse.Namespace) -> Config:
    """The configuration that the flags ask for. Raises ConfigError."""
    return load_config(arguments.config, arguments.overrides)


def output_folder(arguments: argparse.Namespace) -> Path:
    """--output as an absolute path (a submitted job's working directory is temporary), created and writable.

    Of one in a bucket the path that stands for it (`arlon_ray.mirror`).
    """
    if mirror.is_remote(arguments.output):
        folder = mirror.local(arguments.output)
        check_bucket(folder)
        return folder
    folder = Path(arguments.output).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: not writable")
    return folder


def check_bucket(folder: Path) -> None:
    """Raises InputError if nothing can be written to a folder of a bucket."""
    try:
        mirror.check_writable(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {folder}: cannot be written to: {one_line(error)}") from None


def existing(path: str, flag: str) -> Path:
    """`path`, which may be a URI, as an absolute path. Raises InputError that names `flag` if there is nothing."""
    if not path.strip():
        raise InputError(f"{flag}: empty; expected a path")
    found = mirror.local(path).expanduser().absolute()
    try:
        there = mirror.exists(found)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: cannot be reached: {one_line(error)}") from None
    if not there:
        raise InputError(f"{flag} {found}: not found")
    return found


def collection(text: str, flag: str) -> str:
    """Videos that a flag names, here or remote: what `find_sources` takes. Raises InputError if there is nothing."""
    # here: it brings pyarrow, which jobs that read no videos do without
    from data_pipeline import storage
    from data_pipeline.sources import is_pattern

    if storage.is_remote(text):
        try:
            if not is_pattern(text) and not storage.exists(text):
                raise InputError(f"{flag} {text}: not found")
        except OSError as error:
            raise InputError(f"{flag} {text}: cannot be reached: {' '.join(str(error).split())}") from None
        return text
    pattern = Path(text).expanduser().absolute()
    return str(pattern if is_pattern(pattern) else existing(text, flag))


def vae_folder(flag: str | None, config: Config) -> Path:
    """The VAE artefact of --vae, else of `vae.init`. Raises InputError if neither names one."""
    if flag is None and config.vae.init is None:
        raise InputError("vae.init is not set: name a VAE artefact with --vae, or --set vae.init=DIR")
    return existing(flag, "--vae") if flag is not None else existing(str(config.vae.init), "vae.init")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of text, their columns as wide as they need."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def run(main: Callable[[], None], again: str = "nothing is lost, run the same command again to go on") -> None:
    """Run a job; `again` says what can be done where it was interrupted.

    Exit codes: 2 and one line for bad input, 1 and one line for a training that broke or a full disk, 130
    for Ctrl-C, 75 (EX_TEMPFAIL: try again) where SIGTERM stopped it, or another job works on the same output.
    """
    keep_freed_memory()
    asked_to_end = False

    def stop(number: int, _: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True
        signal.signal(number, signal.SIG_DFL)  # whoever sends it again wants no clean end
        raise KeyboardInterrupt  # no other error gets through Ray's waiting

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except (ConfigError, ArtifactError, InputError) as error:
        print(f"error: {mirror.named(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except StoppedError as stopped:
        print(f"stopped: {mirror.named(str(stopped))}", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from None
    except TrainingError as error:
        print(f"error: {mirror.named(str(error))}", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        # also where a worker met it: Ray's error quotes the cause
        if not isinstance(error, OSError) or DISK_FULL not in str(error):
            raise
        print(f"error: the disk is full ({DISK_FULL}): free some of it; {again}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if asked_to_end:
            print(f"stopped: {again}", file=sys.stderr)
            raise SystemExit(os.EX_TEMPFAIL) from None
        print(f"\ninterrupted: {again}", file=sys.stderr)
        raise SystemExit(130) from None
