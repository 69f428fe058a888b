"""Several hosts on one machine: Linux network namespaces, each with an address of its own, on one bridge.

Needs root and `ip` (Debian: iproute2). Files are those of the machine: what has no shared folder must not use one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import IO, Any


@dataclass(frozen=True)
class Host:
    """A namespace. `link` is the bridge's end of its only cable."""

    name: str
    address: str
    link: str

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on this host."""
        return subprocess.Popen(self.command(command), **options)

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs `command` on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        output: IO[Any] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end. Raises CalledProcessError, TimeoutExpired."""
        return subprocess.run(
            self.command(command), check=True, text=True, env=env, timeout=timeout_s,
            stdout=output or subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def cut(self) -> None:
        """Pull the cable: nothing goes in or out, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def restore(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self.link, "up")


@contextmanager
def hosts(count: int, prefix: str = "hosts", network: str = "10.213.0") -> Iterator[list[Host]]:
    """`count` hosts with the addresses .1, .2, … of a /24 `network`; all of it is removed at the end.

    This machine itself is .254: what must be reachable from all hosts (a storage server) can listen there. Whoever
    makes several networks at a time gives each a `network` of its own. `prefix` is the beginning of the hosts' names.
    Raises OSError if the network is in use.
    """
    _clear(f"{network}.254")
    token = uuid.uuid4().hex[:6]
    bridge = f"br{token}"
    with ExitStack() as undo:
        _ip("link", "add", bridge, "type", "bridge")
        undo.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{network}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        made = []
        for number in range(1, count + 1):
            host = Host(f"{prefix}-{token}-{number}", f"{network}.{number}", f"ve{token}{number}")
            _ip("netns", "add", host.name)
            undo.callback(_ip, "netns", "del", host.name)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            undo.callback(_ip, "link", "del", host.link)  # else it stays as long as a program in there lives
            _ip("link", "set", host.link, "master", bridge, "up")
            for words in (
                ("addr", "add", f"{host.address}/24", "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("link", "set", "lo", "up"),
                ("route", "add", "default", "via", f"{network}.254"),
            ):
                _ip("-n", host.name, *words)
            made.append(host)
        yield made


@cache
def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    if shutil.which("ip") is None:
        return "`ip` is missing: apt-get install iproute2"
    if os.geteuid():
        return "network namespaces need root"
    name = f"probe-{uuid.uuid4().hex[:8]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not permitted: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _clear(address: str) -> None:
    """Remove what a run which was killed has left: with two bridges of one address no packet finds its way."""
    for found in json.loads(_ip("-json", "addr", "show", "to", address) or "[]"):
        if not (bridge := found.get("ifname")):
            continue
        if not re.fullmatch("br[0-9a-f]{6}", bridge):
            raise OSError(f"{address} is the address of {bridge}, which is not ours")
        left = [name for name in _names() if f"-{bridge.removeprefix('br')}-" in name]
        if any(_ip("netns", "pids", name).strip() for name in left):
            raise OSError(f"{address} is in use: programs run on the hosts of {bridge}")
        for name in left:
            _ip("netns", "del", name)
        for link in json.loads(_ip("-json", "link", "show", "master", bridge) or "[]"):
            if "ifname" in link:
                _ip("link", "del", link["ifname"])
        _ip("link", "del", bridge)


def _names() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
