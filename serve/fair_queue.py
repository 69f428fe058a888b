"""Whose video is made next."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

from arlon_ray.config import TenantConfig


class Queued(Protocol):
    """What waits."""

    @property
    def id(self) -> str:
        """Of the video or draft."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def segments(self) -> int:
        """How long it is."""


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Turns go to the tenant that has had the fewest segments for its weight.

    That is start-time fair queueing (Goyal et al. 1996): who asked for nothing meanwhile has saved up nothing, and is
    next. Between equals to the one with the fewest videos under way for its weight, then to the one whose last turn is
    longest ago. A tenant with `max_running` of them under way waits. Its own videos are made in the order they came.
    """

    def __init__(self, tenant: Callable[[str], TenantConfig] = lambda _: TenantConfig()) -> None:
        """`tenant` says the weight and the quotas of each."""
        self._tenant = tenant
        self._waiting: dict[str, Q] = {}
        self._turns = _Turns()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Q]:
        return iter(self._waiting.values())

    def of(self, tenant: str) -> int:
        """How many of a tenant wait."""
        return sum(each.tenant == tenant for each in self._waiting.values())

    def get(self, job_id: str) -> Q | None:
        """The one that waits under this id."""
        return self._waiting.get(job_id)

    def add(self, queued: Q) -> None:
        """At the end of its tenant's."""
        self._waiting[queued.id] = queued

    def remove(self, job_id: str) -> Q | None:
        """It waits no longer."""
        return self._waiting.pop(job_id, None)

    def pop(self, running: Iterable[Q]) -> Q | None:
        """Whose turn it is; None if nobody waits who may have one."""
        under_way = Counter(each.tenant for each in running)
        heads: dict[str, Q] = {}
        for each in self._waiting.values():
            heads.setdefault(each.tenant, each)
        free = [name for name in heads if not self._full(name, under_way)]
        if not free:
            return None
        first = min(free, key=lambda name: self._rank(name, under_way, self._turns))
        self._turns.take(first, heads[first].segments / self._tenant(first).weight)
        return self._waiting.pop(heads[first].id)

    def order(self, running: Iterable[Q]) -> list[Q]:
        """All who wait, as their turns will come if none is added; at the end those of tenants that are full."""
        under_way, turns = Counter(each.tenant for each in running), self._turns.copy()
        waiting: dict[str, list[Q]] = defaultdict(list)
        for each in self._waiting.values():
            waiting[each.tenant].append(each)
        ordered: list[Q] = []
        while waiting:
            first = min(waiting, key=lambda name: (self._full(name, under_way), *self._rank(name, under_way, turns)))
            ordered.append(waiting[first].pop(0))
            under_way[first] += 1
            turns.take(first, ordered[-1].segments / self._tenant(first).weight)
            if not waiting[first]:
                del waiting[first]
        return ordered

    def _full(self, name: str, under_way: Counter[str]) -> bool:
        most = self._tenant(name).max_running
        return most is not None and under_way[name] >= most

    def _rank(self, name: str, under_way: Counter[str], turns: _Turns) -> tuple[float, float, int]:
        return (turns.start(name), under_way[name] / self._tenant(name).weight, turns.last[name])


class _Turns:
    """Who has had turns: virtual times, which go on by segments / weight with each turn of a tenant."""

    def __init__(self) -> None:
        self.now = 0.0  # the start of the last turn
        self.ends: dict[str, float] = {}
        self.last: Counter[str] = Counter()  # the number of each one's last turn
        self.count = 0

    def copy(self) -> _Turns:
        """As it is now."""
        other = _Turns()
        other.now, other.ends, other.last, other.count = self.now, dict(self.ends), self.last.copy(), self.count
        return other

    def start(self, name: str) -> float:
        """When the next turn of one would begin."""
        return max(self.now, self.ends.get(name, 0.0))

    def take(self, name: str, cost: float) -> None:
        """It has a turn."""
        self.now = self.start(name)
        self.ends[name] = self.now + cost
        self.count += 1
        self.last[name] = self.count
