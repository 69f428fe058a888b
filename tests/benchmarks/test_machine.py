"""What figures are made of."""

from __future__ import annotations

import time

import pytest

from benchmarks.machine import in_turns


def test_works_take_turns_and_are_compared_with_the_first() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = in_turns({"plain": lambda: work("plain", 0.06), "ours": lambda: work("ours", 0.02)}, runs=3)
    assert order == ["plain", "ours"] * 4  # once to warm up
    assert found["plain"]["times_as_fast"] == 1.0
    assert found["ours"]["from"] <= found["ours"]["times_as_fast"] <= found["ours"]["to"]
    assert found["ours"]["times_as_fast"] == pytest.approx(3, rel=0.5)
