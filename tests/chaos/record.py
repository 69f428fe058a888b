"""What each fault did, one JSON line each: a run that is interrupted goes on behind them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Fault:
    """One fault. `number` counts those of the same kind at the same target."""

    target: str
    kind: str
    number: int
    #: When it struck, in the terms of the target.
    moment: str
    #: What a user was shown: lines of the log, HTTP statuses.
    seen: str
    #: Until the work had gone on; for what is refused, until it was.
    seconds: float
    #: Work that was made again.
    again: str = ""
    #: What had been acknowledged and is gone, or differs from the run that nobody disturbed; empty: nothing.
    lost: str = ""


@dataclass(frozen=True)
class Order:
    """A fault that is to come, with random numbers of its own: what comes before it does not change them."""

    target: str
    kind: str
    number: int
    numbers: random.Random


class Record:
    """The faults of one run, in a file."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path, self._seed = path, seed
        path.parent.mkdir(parents=True, exist_ok=True)
        self.faults = [Fault(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def note(self, fault: Fault) -> None:
        """Keep it, and say it."""
        self.faults.append(fault)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(fault)) + "\n")
        lost = f"  LOST: {fault.lost}" if fault.lost else ""
        print(f"{fault.target}: {fault.kind} {fault.number} {fault.moment}: {fault.seconds:.1f} s{lost}", flush=True)

    def left(self, target: str, kinds: dict[str, int]) -> list[Order]:
        """The faults of a target that are not recorded yet, in an order that depends on the seed alone."""
        done = {(fault.kind, fault.number) for fault in self.faults if fault.target == target}
        orders = list(self._orders(target, kinds))
        random.Random(f"{self._seed}/{target}").shuffle(orders)
        return [order for order in orders if (order.kind, order.number) not in done]

    def _orders(self, target: str, kinds: dict[str, int]) -> Iterator[Order]:
        for kind, count in kinds.items():
            for number in range(count):
                yield Order(target, kind, number, random.Random(f"{self._seed}/{target}/{kind}/{number}"))
