"""Whose video is made next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from serve.active import Active


class FairQueue:
    """Turns go to the owner who has the fewest videos under way, then to the one whose last turn is longest ago.

    An owner's own videos are made in the order they came.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Active] = {}
        self._turns: dict[str, int] = {}  # the number of each owner's last turn
        self._turn = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Active]:
        return iter(self._waiting.values())

    def of(self, owner: str) -> int:
        """How many of an owner wait."""
        return sum(active.owner.name == owner for active in self._waiting.values())

    def get(self, job_id: str) -> Active | None:
        """The one that waits under this id."""
        return self._waiting.get(job_id)

    def add(self, active: Active) -> None:
        """At the end of its owner's."""
        self._waiting[active.video.id] = active

    def remove(self, job_id: str) -> Active | None:
        """It waits no longer."""
        return self._waiting.pop(job_id, None)

    def pop(self, running: Iterable[Active]) -> Active:
        """Whose turn it is. Raises IndexError if nobody waits."""
        first = self.order(running)[0]
        self._turn += 1
        self._turns[first.owner.name] = self._turn
        return self._waiting.pop(first.video.id)

    def order(self, running: Iterable[Active]) -> list[Active]:
        """All who wait, as their turns will come if none is added."""
        under_way = Counter(active.owner.name for active in running)
        turns, turn = dict(self._turns), self._turn
        by_owner: dict[str, list[Active]] = {}
        for active in self._waiting.values():
            by_owner.setdefault(active.owner.name, []).append(active)
        ordered: list[Active] = []
        while by_owner:
            owner = min(by_owner, key=lambda name: (under_way[name], turns.get(name, 0)))
            ordered.append(by_owner[owner].pop(0))
            under_way[owner] += 1
            turn += 1
            turns[owner] = turn
            if not by_owner[owner]:
                del by_owner[owner]
        return ordered
