"""From work to seconds: what one device takes for a call, an operation and a number moved, fitted to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import numpy as np

from arlon_ray.planning.counts import Work


@dataclass(frozen=True)
class Rate:
    """Seconds for each operation of products and of attention, for each number moved, and for each call."""

    product_s: float = 0.0
    attention_s: float = 0.0
    traffic_s: float = 0.0
    call_s: float = 0.0

    def seconds(self, work: Work) -> float:
        """What `work` takes."""
        return float(np.dot(astuple(self), astuple(work)))


def fit(works: Sequence[Work], seconds: Sequence[float]) -> Rate:
    """The rates, none of them negative, with the least sum of squared relative errors.

    Of all choices of the four terms the best one whose least-squares solution has no negative rate: non-negative least
    squares. Raises ValueError where there are no measurements.
    """
    if not works:
        raise ValueError("no measurements to fit: expected at least one")
    relative = np.array([astuple(work) for work in works]) / np.asarray(seconds)[:, None]
    scale = np.where(relative.any(0), np.abs(relative).max(0), 1.0)
    best, least = np.zeros(4), np.inf
    for count in range(1, 5):
        for terms in map(list, combinations(np.flatnonzero(relative.any(0)), count)):
            found = np.linalg.lstsq(relative[:, terms] / scale[terms], np.ones(len(works)), rcond=None)[0]
            rates = np.zeros(4)
            rates[terms] = found / scale[terms]
            error = float(np.square(relative @ rates - 1).sum())
            if (rates >= 0).all() and error < least:
                best, least = rates, error
    return Rate(*map(float, best))
