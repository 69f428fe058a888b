"""Waiting for what a server makes: a bar on a terminal, lines otherwise, and the file at the end."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from serve.client import Client, ClientError, Event, Made

#: Share of a segment, in percent, that is done in each state, as the server counts it.
_DONE = {"planned": 10.0, "rendered": 90.0, "completed": 100.0}


class DetachedError(KeyboardInterrupt):
    """Ctrl-C while something was watched that goes on without."""


class MakingError(RuntimeError):
    """The server could not make it."""


def bad_input(message: str) -> ClientError:
    """The error for flags that no server needs to see."""
    return ClientError(message, 400)


def check_output(output: str | None) -> None:
    """Raises ClientError if no file can be written there. Creates nothing."""
    if output is None:
        return
    path = Path(output).expanduser().absolute()
    if path.is_dir():
        raise bad_input(f"--output {path}: is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise bad_input(f"--output {path}: {path.parent} is not a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise bad_input(f"--output {path}: {path.parent} is not writable")


def download(client: Client, made_id: str, output: str, variant: str = "video") -> Path:
    """Fetch a file. Raises ClientError."""
    path = Path(output).expanduser().absolute()
    try:
        client.download(made_id, path, variant)
    except OSError as error:
        raise ClientError(f"--output {path}: cannot be written: {error.strerror}") from None
    return path


def go_on(client: Client, made: Made, arguments: argparse.Namespace) -> None:
    """Print the id of what was accepted; with --wait or --output watch it, and fetch it.

    Raises MakingError if it fails, ClientError, DetachedError at Ctrl-C.
    """
    made_id, again = made["id"], f"arlon watch {made['id']}{_address(arguments)}"
    if not (arguments.wait or arguments.output):
        print(made_id)
        print(f"watch it with: {again}", file=sys.stderr)
        return
    try:
        made = _watched(client, made)
    except KeyboardInterrupt:
        raise DetachedError(f"{made_id} goes on without you; watch it with: {again}") from None
    frames = sum(segment["frames"] for segment in made["segments"])
    length = f"{frames} frames ({float(made['seconds']):.4g} s)"
    if arguments.output:
        print(f"{download(client, made_id, arguments.output)}: {length}")
    else:
        print(f"{made_id}: {length}")


def _address(arguments: argparse.Namespace) -> str:
    # never the key: this is printed
    return f" --url {shlex.quote(arguments.url)}" if arguments.url != os.environ.get("ARLON_URL") else ""


def _watched(client: Client, made: Made) -> Made:
    with Display(made) as display:
        while made["status"] in ("queued", "in_progress"):
            for event in client.watch(made["id"]):
                display.show(event)
                if event.type == "deleted":
                    raise MakingError(f"{made['id']} was deleted")
            made = client.get(made["id"])
    if made["status"] == "failed":
        error = made["error"] or {}
        raise MakingError(f"{made['id']} failed: {error.get('message', 'no reason given')}")
    return made


class Display:
    """What happens, on stderr. A context manager: the bar goes at its end."""

    def __init__(self, made: Made, *, bar: bool | None = None) -> None:
        self._count = len(made["segments"])
        self._states: dict[int, float] = {}
        self._bar: Any = None
        print(made["id"], file=sys.stderr)
        if sys.stderr.isatty() if bar is None else bar:
            line = "{desc} {percentage:3.0f} %|{bar}| {elapsed}{postfix}"
            self._bar = tqdm(total=100, desc="waiting", bar_format=line, dynamic_ncols=True)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: Event) -> None:
        """One event more."""
        kind, data = event.type, event.data
        if kind == "queue":
            before = data["position"]
            self._say(f"queued: {before} before it" if before else "queued: next in line", lasting=False)
        elif kind == "in_progress":
            self._say("begun", lasting=False)
        elif kind.startswith("segment."):
            self._segment(kind.removeprefix("segment."), data)

    def _segment(self, what: str, data: dict[str, Any]) -> None:
        index = data["index"]
        name = f"segment {index + 1}/{self._count}"
        if what == "step":
            self._reach(index, 10 + 80 * data["step"] / data["steps"])
            if self._bar is not None:
                self._say(f"{name}, step {data['step']}/{data['steps']}", lasting=False)
            return
        if what == "reset":
            self._states[index] = 0.0
            self._say(f"{name}: planned anew", lasting=True)
            return
        self._reach(index, _DONE.get(what, 0.0))
        self._say(f"{name} {'ready' if what == 'completed' else what}", lasting=what == "completed")

    def _reach(self, index: int, percent: float) -> None:
        self._states[index] = max(percent, self._states.get(index, 0.0))
        if self._bar is not None:
            self._bar.n = min(100.0, sum(self._states.values()) / self._count)

    def _say(self, text: str, *, lasting: bool) -> None:
        """On a terminal all of it stands before the bar, for as long as it is true; else one line each."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
            return
        self._bar.set_description_str(text)
