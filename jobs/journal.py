"""How a training in Ray's workers tells its driver: rank 0 appends lines to a file that the driver follows.

The driver then prints and tracks. So workers need no MLflow, the terminal gets clean lines, and after a worker's death
the new one goes on in the same file. The file lies in the training's storage folder, which all nodes share.
"""

from __future__ import annotations

import json
import signal
import threading
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.training.loop import Reporter

JOURNAL_FILE = "journal.jsonl"


class JournalReporter:
    """The Reporter of a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: list[str] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        self._write("metrics", step=step, values=dict(values))

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """See Reporter."""
        file = f"picture-{uuid.uuid4().hex}.npy"
        try:
            np.save(self.folder / file, array)
        except OSError as error:
            self.line(f"the picture {name} of step {step} is lost: {error}")
            return
        self._write("picture", step=step, name=name, file=file)

    def checkpoint(self, step: int, folder: Path) -> None:
        """See Reporter."""
        self._write("checkpoint", step=step, folder=str(folder))

    def line(self, text: str) -> None:
        """See Reporter."""
        self._write("line", text=text)

    def done(self, artifact_kind: str) -> None:
        """The artefact is written."""
        self._write("done", artifact_kind=artifact_kind)

    def stopped(self, text: str) -> None:
        """Training ended before its last step because it was asked to."""
        self._write("stopped", text=text)

    def _write(self, kind: str, **values: Any) -> None:
        """Add a line; while the storage fails, lines wait for the next one."""
        self._waiting.append(json.dumps({"kind": kind, **values}) + "\n")
        try:
            with (self.folder / JOURNAL_FILE).open("a") as file:
                file.write("".join(self._waiting))
        except OSError:
            self._waiting.insert(0, "\n")  # ends what was half written
        else:
            self._waiting.clear()


class JournalReader:
    """Follows a journal from its present end and passes everything on."""

    def __init__(self, folder: Path, reporters: Sequence[Reporter]) -> None:
        self.folder, self.reporters = folder, reporters
        self.artifact_kind: str | None = None
        self.stopped: str | None = None
        #: Whether a worker has said anything.
        self.heard = False
        path = folder / JOURNAL_FILE
        # What an earlier, interrupted run wrote was passed on then; its last line may be cut short.
        with path.open("a") as file:
            if file.tell():
                file.write("\n")
            self._position = file.tell()

    def drain(self) -> None:
        """Pass on the whole lines that are new; none while the storage fails."""
        try:
            with (self.folder / JOURNAL_FILE).open("rb") as file:
                file.seek(self._position)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short by the death of a worker
            self._pass_on(event)

    @contextmanager
    def following(self, interval_s: float = 0.3) -> Iterator[None]:
        """Within the block a thread passes everything on. An error of a reporter ends the block, and is raised."""
        ended, errors = threading.Event(), list[BaseException]()
        caller = threading.get_ident()

        def follow() -> None:
            try:
                while not ended.wait(interval_s):
                    self.drain()
                self.drain()
            except BaseException as error:
                errors.append(error)
                if caller == threading.main_thread().ident and not ended.is_set():
                    signal.pthread_kill(caller, signal.SIGINT)

        thread = threading.Thread(target=follow, name="journal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if errors:
                raise errors[0] from None

    def line(self, text: str) -> None:
        """Tell the reporters something that no worker knows."""
        for reporter in self.reporters:
            reporter.line(text)

    def _pass_on(self, event: dict[str, Any]) -> None:
        kind, self.heard = event["kind"], True
        if kind == "done":
            self.artifact_kind = event["artifact_kind"]
        if kind == "stopped":
            self.stopped = event["text"]
        for reporter in self.reporters:
            if kind == "metrics":
                reporter.metrics(event["step"], event["values"])
            elif kind == "picture":
                reporter.picture(event["name"], np.load(self.folder / event["file"]), event["step"])
            elif kind == "checkpoint":
                reporter.checkpoint(event["step"], Path(event["folder"]))
            elif kind == "line":
                reporter.line(event["text"])


class FailureNote:
    """Why a training cannot go on, for the next attempt's workers and for the driver.

    Ray Train restarts the workers after any error. One that must come again (a NaN: every step is deterministic) is
    noted with the driver's attempt id, and restarted workers give up at once.
    """

    def __init__(self, folder: Path, attempt: str) -> None:
        self._path = folder / f"failure-{attempt}.json"

    def write(self, error: BaseException) -> None:
        """Note the error and its traceback."""
        text = json.dumps({"error": str(error), "traceback": traceback.format_exc()})
        self._path.write_text(text)

    def read(self) -> str | None:
        """The error's line, if there was one in this attempt."""
        try:
            return str(json.loads(self._path.read_text())["error"])
        except FileNotFoundError:
            return None
