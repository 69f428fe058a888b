"""Hosts that share nothing but the code: namespaces of network, names, mounts and processes, and a Ray over them.

Processes too: a driver looks for its node among all raylets that it sees, and takes the head's if that is one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from jobs.ray_session import path_with_interpreter
from tests.namespaces import Host, hosts

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
GCS_PORT, STARTS = 6379, 10


class SeparateHost:
    """A host whose `folder`, /dev/shm, name and processes are its own; the path of `folder` is the same on all.

    `outside` is where the folder lies for this process.
    """

    def __init__(self, host: Host, name: str, folder: Path, outside: Path, names: Path) -> None:
        self.address, self.name, self.folder, self.outside = host.address, name, folder, outside
        outside.mkdir(parents=True)
        script = (
            f"hostname {name} && mount --bind {outside} {folder} && mount --bind {names} /etc/hosts "
            "&& mount -t tmpfs tmpfs /dev/shm && echo ready && exec sleep infinity"
        )
        separate = ["--mount", "--propagation", "private", "--uts", "--pid", "--fork", "--mount-proc"]
        command = ["unshare", *separate, "sh", "-c", script]
        self._holder = host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None and self._holder.stderr is not None
        if self._holder.stdout.readline() != "ready\n":
            raise OSError(self._holder.stderr.read())
        self._first = psutil.Process(self._holder.pid).children()[0]
        (outside / "home").mkdir()

    def inside(self, command: Sequence[str]) -> list[str]:
        """What runs `command` on this host."""
        spaces = ["--mount", "--uts", "--net", "--pid"]
        return ["nsenter", f"--target={self._first.pid}", *spaces, f"--wd={ROOT}", "--", *command]

    @property
    def environment(self) -> dict[str, str]:
        """What this host's programs find. Compiled extensions are code: they are shared."""
        from jobs.shared_memory_op import extensions_folder  # which imports DeepSpeed

        return {
            **os.environ,
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "home"),
            "PATH": path_with_interpreter(),
            "PYTHONPATH": str(ROOT),
            "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-all-hosts",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def popen(self, command: Sequence[str], log: Path, **more: str) -> subprocess.Popen[Any]:
        """Start a program; what it says goes to `log`."""
        with log.open("w") as file:
            environment = self.environment | more
            return subprocess.Popen(self.inside(command), env=environment, stdout=file, stderr=subprocess.STDOUT)

    def run(self, command: Sequence[str], timeout_s: float = 300, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        environment = self.environment | more
        return subprocess.run(self.inside(command), env=environment, capture_output=True, text=True, timeout=timeout_s)

    def replace(self, file: Path, text: str) -> None:
        """Let a file of the code have another content on this host. For programs that are started after this."""
        other = self.outside / file.name
        other.write_text(text)
        done = self.run(["mount", "--bind", str(self.folder / file.name), str(file)])
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        """End all that runs there."""
        self._first.kill()
        self._holder.wait()


@contextmanager
def separate_hosts(count: int, folder: Path, network: str) -> Iterator[list[SeparateHost]]:
    """Hosts h1, h2, …; what they keep lies in `folder`/h1 and so on. This machine is .254 of the network."""
    with ExitStack() as undo:
        made = undo.enter_context(hosts(count, prefix="separate", network=network))
        # short: Ray's sockets lie below it
        place = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="h", dir="/tmp")))
        names = folder / "names"
        lines = [f"{host.address} h{number}" for number, host in enumerate(made, 1)]
        names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        result = []
        for number, host in enumerate(made, 1):
            separate = SeparateHost(host, f"h{number}", place, folder / f"h{number}", names)
            undo.callback(separate.close)
            result.append(separate)
        yield result


@contextmanager
def ray_on(nodes: Sequence[SeparateHost], logs: Path) -> Iterator[str]:
    """A head without work on the first host, a worker of one CPU on each other one; yields the cluster's address."""
    head, *workers = nodes
    address = f"{head.address}:{GCS_PORT}"
    with ExitStack() as undo:
        words = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false"]
        undo.callback(end, start_ray(head, [*words, f"--temp-dir={head.folder}/r"], logs))
        for worker in workers:
            undo.callback(end, start_ray(worker, [f"--address={address}", "--num-cpus=1"], logs))
        yield address


def start_ray(node: SeparateHost, words: Sequence[str], logs: Path) -> subprocess.Popen[Any]:
    """`ray start` on a host, until it has started. On a busy machine Ray's own limit of 30 s is met: then once more."""
    fixed = [f"--node-ip-address={node.address}", "--object-store-memory=150000000", "--disable-usage-stats", "--block"]
    log = logs / f"{node.name}.log"
    for _ in range(STARTS):
        process = node.popen([RAY, "start", *fixed, *words], log)
        while process.poll() is None:
            if "Ray runtime started" in log.read_text():
                return process
            time.sleep(0.5)
        end(process)
        if "timed out during startup" not in log.read_text():
            break
    raise AssertionError(log.read_text())


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a program and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait(timeout=60)


def ask(node: SeparateHost, address: str, expression: str) -> str:
    """What a Python expression over `ray`, connected from this host, comes to; empty where it cannot connect."""
    code = f"import ray, logging; ray.init(address='auto', logging_level=logging.ERROR); print('answer', {expression})"
    done = node.run([sys.executable, "-c", code], RAY_ADDRESS=address)
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    return lines[-1].removeprefix("answer ") if lines else ""


def alive(node: SeparateHost, address: str) -> list[str]:
    """Addresses of the nodes that are there."""
    return ask(node, address, "*[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']]").split()
