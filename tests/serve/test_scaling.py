"""Replicas follow the work of their own deployment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serve.scaling import PAUSED, replicas_for_work


def context(requests: float, target: float, **paused: float) -> SimpleNamespace:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: target)
    metrics = {PAUSED: paused} if paused else {}
    return SimpleNamespace(total_num_requests=requests, aggregated_metrics=metrics, config=config)


@pytest.mark.parametrize(
    ("requests", "target", "paused", "expected"),
    [
        (0, 2, {}, 0),
        (1, 2, {}, 1),
        (5, 2, {}, 3),
        (4, 2, {}, 2),
        (4.01, 2, {}, 2),  # what an average leaves of a call that is over
        (6, 1, {"a": 3, "b": 2}, 1),  # six plans, of which one may go on
        (2, 1, {"a": 2}, 0),
        (1, 1, {"a": 3}, 0),  # the two are measured at different times
    ],
)
def test_replicas(requests: float, target: float, paused: dict[str, float], expected: int) -> None:
    assert replicas_for_work(context(requests, target, **paused))[0] == expected
