"""The journal from a training's worker to its driver: what is passed on, and how a reporter's error ends the driver."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from arlon_ray.training.reporting import QuietReporter
from jobs.journal import JOURNAL_FILE, JournalReader, JournalReporter


class Listener(QuietReporter):
    """Notes the steps that it is told; cannot write step 3."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if step == 3:
            raise BrokenPipeError("nobody reads")
        self.steps.append(step)


def test_all_that_was_written_within_the_block_is_passed_on_and_nothing_from_before(tmp_path: Path) -> None:
    worker, listener = JournalReporter(tmp_path), Listener()
    worker.metrics(1, {"loss": 1.0})
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"kind": "metr')  # the death of a worker
    reader = JournalReader(tmp_path, [listener])
    with reader.following():
        worker.metrics(2, {"loss": 1.0})
        worker.metrics(4, {"loss": 1.0})
    assert listener.steps == [2, 4]


def test_a_reporters_error_ends_what_waits(tmp_path: Path) -> None:
    worker = JournalReporter(tmp_path)
    begin = time.monotonic()
    with pytest.raises(BrokenPipeError, match="nobody reads"), JournalReader(tmp_path, [Listener()]).following(0.01):
        worker.metrics(3, {"loss": 1.0})
        time.sleep(60)
    assert time.monotonic() - begin < 30


def test_an_interruption_within_the_block_is_what_is_raised(tmp_path: Path) -> None:
    worker, listener = JournalReporter(tmp_path), Listener()
    with pytest.raises(KeyboardInterrupt), JournalReader(tmp_path, [listener]).following(60):
        worker.metrics(2, {"loss": 1.0})
        raise KeyboardInterrupt
    assert listener.steps == [2]
