"""`arlon`: make videos in this process, serve them, or have a server make them.

`arlon submit --prompt "…" --output video.mp4` asks the server of ARLON_URL, with the key in ARLON_API_KEY.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from jobs.remote import COMMANDS
from jobs.watching import DetachedError, MakingError
from serve.client import Client, ClientError

DEFAULT_URL = "http://127.0.0.1:8000"

#: Jobs that bring their own flags; their modules are loaded when they are asked for.
JOBS = {
    "generate": ("jobs.generate", "make a video in this process, without a server"),
    "edit": ("jobs.edit", "change a video that was made so"),
    "serve": ("jobs.serve_bundle", "serve a model bundle over HTTP"),
    "keys": ("jobs.keys", "add, list and revoke the keys of a server"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line. Exit codes: 2 and one line for bad input, 1 and one line for what failed, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name in JOBS:
        _run_job(name, words[1:])
    elif name in COMMANDS:
        _run_command(name, words[1:])
    else:
        near = difflib.get_close_matches(name, [*JOBS, *COMMANDS], 1)
        asked = f"did you mean {near[0]}?" if near else f"expected one of {', '.join([*JOBS, *COMMANDS])}"
        print(f"error: arlon {name}: no such command; {asked}", file=sys.stderr)
        raise SystemExit(2)


def _overview() -> str:
    rows = [(name, about) for name, (_, about) in JOBS.items()]
    rows += [(name, command.about) for name, command in COMMANDS.items()]
    lines = [f"  {name:<10}{about}" for name, about in rows]
    return "\n".join([f"{__doc__}\ncommands (each has --help):", *lines])


def _run_job(name: str, words: list[str]) -> None:
    """As `python jobs/NAME.py` does."""
    from jobs import command_line

    # what argparse shows as the program's name, and what Ray's workers are told of it
    sys.argv = [f"arlon {name}", *words]
    command_line.run(importlib.import_module(JOBS[name][0]).main)


def _run_command(name: str, words: list[str]) -> None:
    command = COMMANDS[name]
    flags = argparse.ArgumentParser(prog=f"arlon {name}", description=command.about, allow_abbrev=False)
    command.flags(flags)
    url = os.environ.get("ARLON_URL") or DEFAULT_URL
    flags.add_argument("--url", default=url, help=f"the server (default: ARLON_URL, else {DEFAULT_URL})")
    flags.add_argument("--key", help="default: ARLON_API_KEY, which other users of the machine cannot see")
    arguments = flags.parse_args(words)
    try:
        with Client(arguments.url, arguments.key or os.environ.get("ARLON_API_KEY")) as client:
            command.run(client, arguments)
    except ClientError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2 if error.bad_input else 1) from None
    except MakingError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except DetachedError as detached:
        print(f"\ndetached: {detached}", file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # `arlon list | head`: nobody reads what is left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
