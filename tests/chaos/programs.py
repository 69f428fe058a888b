"""A command of the project as a process of its own, and its processes, to be killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.namespaces import Host

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1800.0


class Program:
    """`python jobs/NAME.py …`; what it prints is added to `log`."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[object],
        log: Path,
        env: dict[str, str] | None = None,
        *,
        prelude: str = "",
        host: Host | None = None,
    ) -> None:
        """`prelude`: Python that is run before the job's own `main`. `host`: where it runs (default: here)."""
        self.log = log
        start = [str(ROOT / "jobs" / f"{name}.py")]
        if prelude:
            start = ["-c", f"{prelude}; import jobs.{name} as job, jobs.command_line as line; line.run(job.main)"]
        command = [sys.executable, *start, *map(str, arguments)]
        self._command = host.command(command) if host else command
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(env or {})}
        self._start()

    def _start(self) -> None:
        self._begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, env=self._env
            )

    def printed(self) -> str:
        """All that it has printed so far."""
        with self.log.open("rb") as file:
            file.seek(self._begin)
            return file.read().decode(errors="replace")

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def until(self, done: Callable[[], bool]) -> None:
        """Wait until something is so. Raises RuntimeError with the log if it ends before, or takes too long."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            if not self.running() or time.monotonic() > end:
                if done():
                    return
                if self._too_slow():
                    self._start()
                    continue
                raise RuntimeError(f"exit code {self.process.returncode}: {self.printed()[-3000:]}")
            time.sleep(0.05)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        while True:
            code = self.process.wait(PATIENCE_S)
            if not self._too_slow():
                return code
            self._start()

    def _too_slow(self) -> bool:
        """Whether it ended because Ray gives a node 30 seconds to start, which a machine at its limit needs more than.

        That is no fault of ours: it is started again.
        """
        return bool(self.process.poll()) and "The current node timed out during startup" in self.printed()

    def family(self, *names: str) -> list[psutil.Process]:
        """Its processes, and theirs, whose title begins with one of the names."""
        return titled(psutil.Process(self.process.pid).children(recursive=True), *names)

    def kill(self) -> None:
        """SIGKILL to it and all that it has started."""
        processes = []
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        kill(processes)
        self.process.wait(20)


def titled(processes: Sequence[psutil.Process], *names: str) -> list[psutil.Process]:
    """Those whose title, or whose program, begins with one of the names."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(names) or process.name() in names:
                found.append(process)
    return found


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, 20)


def run(name: str, arguments: Sequence[object], log: Path) -> None:
    """A command to its end. Raises RuntimeError with what it printed if it fails."""
    program = Program(name, arguments, log)
    if program.end():
        raise RuntimeError(program.printed()[-3000:])


def told(text: str, *, progress: str = "samples/s") -> str:
    """What is worth telling of a log: the lines that are no progress, without repetition, cut."""
    lines = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip() and progress not in line)
    return " / ".join(line[:160] for line in lines)[:600]
