"""How a training in Ray's workers tells its driver: rank 0 appends lines to a file that the driver follows.

The driver then prints and tracks. So workers need no MLflow, the terminal gets clean lines, and after a worker's death
the new one goes on in the same file. The file lies in the training's storage folder, which all nodes share; where that
is in a bucket, which cannot append, each write is a file of its own.
"""

from __future__ import annotations

import io
import json
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray import mirror
from arlon_ray.artifact import write_json
from arlon_ray.training.loop import Reporter

JOURNAL_FILE, JOURNAL_FOLDER = "journal.jsonl", "journal"
#: Seconds between two looks into the journal: in a folder, and in a bucket.
LOOK_S, LOOK_INTO_BUCKET_S = 0.3, 1.0


class JournalReporter:
    """The Reporter of a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: list[str] = []
        if mirror.origin(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter."""
        self._write("metrics", step=step, values=dict(values))

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """See Reporter."""
        file = f"picture-{uuid.uuid4().hex}.npy"
        try:
            np.save(self.folder / file, array)
            mirror.push(self.folder / file)
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
            _append(self.folder, "".join(self._waiting))
        except OSError:
            self._waiting.insert(0, "\n")  # ends what was half written
        else:
            self._waiting.clear()


def _append(folder: Path, text: str) -> None:
    if mirror.origin(folder) is None:
        with (folder / JOURNAL_FILE).open("a") as file:
            file.write(text)
        return
    page = folder / JOURNAL_FOLDER / f"{time.time_ns():020}-{uuid.uuid4().hex[:8]}.jsonl"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    mirror.push(page)


class _File:
    """What is new in a journal file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # What an earlier, interrupted run wrote was passed on then; its last line may be cut short.
        with path.open("a") as file:
            if file.tell():
                file.write("\n")
            self._position = file.tell()

    def new_lines(self) -> bytes:
        """Whole lines. Raises OSError."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole


class _Pages:
    """The same for a journal in a bucket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = set(mirror.glob(folder, "*.jsonl"))

    def new_lines(self) -> bytes:
        """Whole lines. Raises OSError."""
        lines = b""
        for page in mirror.glob(self._folder, "*.jsonl"):
            if page not in self._seen:
                lines += mirror.read(page)
                self._seen.add(page)
        return lines


class JournalReader:
    """Follows a journal from its present end and passes everything on."""

    def __init__(self, folder: Path, reporters: Sequence[Reporter]) -> None:
        self.folder, self.reporters = folder, reporters
        self.artifact_kind: str | None = None
        self.stopped: str | None = None
        #: Whether a worker has said anything.
        self.heard = False
        remote = mirror.origin(folder) is not None
        self._lines = _Pages(folder / JOURNAL_FOLDER) if remote else _File(folder / JOURNAL_FILE)
        self._look_s = LOOK_INTO_BUCKET_S if remote else LOOK_S

    def drain(self) -> None:
        """Pass on the whole lines that are new; none while the storage fails."""
        try:
            lines = self._lines.new_lines()
        except OSError:
            return
        for line in lines.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short by the death of a worker
            self._pass_on(event)

    @contextmanager
    def following(self, interval_s: float | None = None) -> Iterator[None]:
        """Within the block a thread passes everything on. An error of a reporter ends the block, and is raised."""
        ended, errors = threading.Event(), list[BaseException]()
        caller = threading.get_ident()

        def follow() -> None:
            try:
                while not ended.wait(interval_s or self._look_s):
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
                picture = np.load(io.BytesIO(mirror.read(self.folder / event["file"])))
                reporter.picture(event["name"], picture, event["step"])
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
        write_json(self._path, {"error": str(error), "traceback": traceback.format_exc()})

    def read(self) -> str | None:
        """The error's line, if there was one in this attempt."""
        try:
            return str(json.loads(mirror.read(self._path))["error"])
        except FileNotFoundError:
            return None
