"""One job at a time on one output: who is at work there says so for as long as it lives, in any folder that is shared.

Locks of the system are not to be had everywhere (NFS without its lock daemon, mounted buckets), and do not say who
holds them. So a holder writes a file anew every few seconds, and who finds one that stays as it is takes its place. All
of it rests on this, that of several who make a file of one name only one succeeds: file N is followed by file N + 1.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import psutil

from arlon_ray import mirror
from arlon_ray.config import Config
from arlon_ray.training.loop import StoppedError
from jobs.ray_session import connect

BEAT_S = 5.0
#: A holder whose file has not changed for so long is gone. Clocks of several machines are not compared.
GONE_S = 45.0
#: Ray's namespace of the actors that say who is at work in a bucket.
CLAIMS = "arlon-outputs"
_SIZE = 1024  # bytes of a file: one write, so that nobody reads half of it


class BusyError(StoppedError):
    """Another job is at work on the same output: try again when it has ended."""


@contextmanager
def holding(folder: Path, name: str) -> Iterator[None]:
    """Within the block no other job works on `name` in `folder`, on whatever machine. Raises BusyError if one does.

    What a holder that was killed has left is found out at once on its own machine, and in `GONE_S` on another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = _Held(folder, name)
    held.take()
    ended = threading.Event()
    beating = threading.Thread(target=held.beat, args=(ended,), name="arlon-holding", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        held.let_go()


@contextmanager
def alone(config: Config, folder: Path, name: str) -> Iterator[None]:
    """`holding`, and for a folder in a bucket `claimed` too, on a Ray that is connected to for it. Raises BusyError."""
    with ExitStack() as held:
        held.enter_context(holding(folder, name))
        if (location := mirror.origin(folder)) is not None:
            held.enter_context(connect(config))
            held.enter_context(claimed(location, name))
        yield


@contextmanager
def claimed(location: str, name: str) -> Iterator[None]:
    """`holding` for a folder in a bucket, where no file is made only once, among the jobs of the Ray cluster that this
    one is connected to: who is at work there has an actor, which dies with its job and its node. Raises BusyError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    me, place = _holder(), _place_in_bucket(location)
    beside_me = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"name": f"{place}/{name}", "namespace": CLAIMS, "get_if_exists": True, "num_cpus": 0}
    claim: Any = ray.remote(_Claim)
    claim = claim.options(**options, scheduling_strategy=beside_me)
    for further in reversed(range(5)):
        try:
            actor = claim.remote(me)
            found = ray.get(actor.holder.remote())
            break
        except ray.exceptions.RayActorError:  # it was about to end
            if not further:
                raise
            time.sleep(0.5)
    if found["id"] != me["id"]:
        raise BusyError(_busy(place, found))
    try:
        yield
    finally:
        ray.kill(actor)


def _place_in_bucket(location: str) -> str:
    """What a URI names, without keys and options of access."""
    parts = urlsplit(location)
    server = dict(parse_qsl(parts.query)).get("endpoint_override", "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" + (f" of {server}" if server else "")


class _Claim:
    def __init__(self, holder: dict[str, Any]) -> None:
        self._holder = holder

    def holder(self) -> dict[str, Any]:
        return self._holder


class _Held:
    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._number, self._beats = 0, 0
        self._me = _holder()

    def take(self) -> None:
        """Make the next file. Raises BusyError."""
        while True:
            latest = self._latest()
            if latest:
                self._wait_for_its_end(latest)
            self._number = latest + 1
            try:
                file = os.open(self._path(self._number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                continue
            with os.fdopen(file, "wb") as opened:
                opened.write(self._text())
            if self._latest() == self._number:  # else it came late, and others have gone on
                break
            self._path(self._number).unlink(missing_ok=True)
        for number in self._numbers():
            if number < self._number:
                self._path(number).unlink(missing_ok=True)

    def _wait_for_its_end(self, number: int) -> None:
        """Returns when the holder of a file has ended. Raises BusyError if it lives."""
        first = self._read(number)
        if first is None or first.get("ended"):
            return
        alive = _lives(first)
        if alive is None:
            print(
                f"{self._folder}: {_described(first)} was at work here: waiting up to {GONE_S:g} s to see if it lives",
                flush=True,
            )
            deadline = time.monotonic() + GONE_S
            while time.monotonic() < deadline:
                time.sleep(BEAT_S / 5)
                now = self._read(number)
                if now is None or now.get("ended"):
                    return
                if now != first:
                    alive = True
                    break
        if alive:
            raise BusyError(_busy(self._folder, first))

    def beat(self, ended: threading.Event) -> None:
        """Say again and again that this one lives. Ends the process if another has taken its place."""
        while not ended.wait(BEAT_S):
            self._beats += 1
            with suppress(OSError):  # storage that is away comes back, or the job fails for it
                if self._latest() > self._number:
                    print(
                        f"error: {self._folder}: another job has taken this one for dead", file=sys.stderr, flush=True
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write(self._text())

    def let_go(self) -> None:
        """The next one need not wait."""
        with suppress(OSError):
            if self._latest() == self._number:
                self._write(self._text(ended=True))

    def _write(self, text: bytes) -> None:
        # in place, never a new file: readers of other machines look into the one that they know
        with self._path(self._number).open("r+b") as file:
            file.write(text)

    def _text(self, **more: Any) -> bytes:
        return json.dumps({**self._me, "beats": self._beats, **more}).encode().ljust(_SIZE)

    def _read(self, number: int) -> dict[str, Any] | None:
        """What a file says; nothing if it is gone, or its writer died before it had written."""
        try:
            found = json.loads(self._path(number).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {"beats": -1}
        return found if isinstance(found, dict) else {"beats": -1}

    def _latest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        texts = [path.name.rsplit("-", 1)[1] for path in self._folder.glob(f".{escape(self._name)}.job-*")]
        return [int(text) for text in texts if text.isdigit()]

    def _path(self, number: int) -> Path:
        return self._folder / f".{self._name}.job-{number:06d}"


def _holder() -> dict[str, Any]:
    """What says who this is."""
    return {"id": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"), **_place(), "job": _job()}


def _busy(place: str | Path, holder: dict[str, Any]) -> str:
    how = f"follow it with `ray job logs -f {holder['job']}`" if holder.get("job") else "wait until it has ended"
    return (
        f"{place}: {_described(holder)} is at work here since {holder.get('since')}: {how}; the same command then "
        "finds what it has made"
    )


def _place() -> dict[str, Any]:
    """Where a process is found again: `space` tells containers apart whose machine bears one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = [boot.read_text().strip() if boot.exists() else "", ""]
    with suppress(OSError):
        space[1] = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": space, "pid": pid, "born": _born(pid)}


def _born(pid: int) -> float:
    """When a process began, by a clock that nobody sets. Raises psutil.NoSuchProcess."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return float(stat.read_text().rpartition(")")[2].split()[19])  # ticks since the machine started
    except OSError:
        return psutil.Process(pid).create_time()


def _lives(holder: dict[str, Any]) -> bool | None:
    """Whether a holder's process is there; None where that cannot be seen from here."""
    here = _place()
    if (holder.get("host"), holder.get("space")) != (here["host"], here["space"]):
        return None
    try:
        pid = holder["pid"]
        return _born(pid) == holder.get("born") and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _job() -> str:
    """The submission id of this process's Ray job, if it is one."""
    try:
        return str(json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return ""


def _described(holder: dict[str, Any]) -> str:
    named = f"job {holder['job']}" if holder.get("job") else f"process {holder.get('pid', '?')}"
    return f"{named} on {holder.get('host', '?')}"
