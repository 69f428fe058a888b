"""Stages in threads: order, errors, closing, how far they run ahead; and the record of who worked when."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.generation import Timeline, VideoGenerator
from arlon_ray.generation.overlapped import in_background
from tests.bundles import make_random_bundle


class Counting:
    """0, 1, 2, … `fails_at` raises; notes how many were made, and whether it was closed."""

    def __init__(self, count: int, fails_at: int | None = None) -> None:
        self.count, self.fails_at, self.made, self.closed = count, fails_at, 0, False

    def items(self) -> Iterator[int]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise RuntimeError(f"item {number}")
                self.made += 1
                yield number
        finally:
            self.closed = True


def threads() -> int:
    return sum(thread.name == "arlon-stage" for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [1, 3])
def test_items_come_in_order_and_no_more_than_allowed_are_made(ahead: int) -> None:
    source, found = Counting(20), []
    for item in in_background(source.items(), ahead):
        time.sleep(0.002)
        assert source.made <= item + 1 + ahead
        found.append(item)
    assert found == list(range(20)) and source.closed and not threads()


def test_an_error_is_raised_in_its_turn() -> None:
    source, found = Counting(20, fails_at=3), []
    with pytest.raises(RuntimeError, match="item 3"):
        for item in in_background(source.items(), 5):
            found.append(item)
    assert found == [0, 1, 2] and source.closed and not threads()


def test_closing_stops_the_thread() -> None:
    source = Counting(10**9)
    items = in_background(source.items(), 2)
    assert next(items) == 0
    items.close()  # type: ignore[attr-defined]
    made = source.made
    assert made <= 4 and source.closed and not threads()


def test_the_record_of_a_video(tmp_path: Path) -> None:
    generator, timeline = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b")), Timeline()
    parts = list(generator.generate(["a"] * 3, 1, timeline=timeline))
    assert all(len(timeline.seconds(stage)) == 3 for stage in ("ar", "dit", "decoder"))
    starts = {(stage, segment): (start, end) for stage, segment, start, end in timeline.spans}
    for segment in range(3):  # each stage begins with what the one before has finished
        assert starts["ar", segment][1] <= starts["dit", segment][0] + 1e-3
        assert starts["dit", segment][1] <= starts["decoder", segment][0] + 1e-3
    # planning of the next one does not wait for the rendering of this one
    assert starts["ar", 1][0] < starts["dit", 0][1]
    timeline.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"ar", "dit", "decoder"}
    assert sum(event["ph"] == "X" for event in events) == 9 and all(event.get("dur", 1) > 0 for event in events)
    # threads change nothing
    again = list(generator.generate(["a"] * 3, 1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_video_that_is_given_up_leaves_no_threads(tmp_path: Path) -> None:
    frames = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b")).generate(["a"] * 50, 1)
    next(frames)
    frames.close()  # type: ignore[attr-defined]
    assert not threads()
