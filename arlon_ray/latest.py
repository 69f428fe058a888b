"""What takes long to make is kept, but not without end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Latest(Generic[K, V]):
    """The values of the `most` keys that were used last. Threads may share it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K) -> V | None:
        """The value, whose key is now the one that was used last; None if there is none (any more)."""
        value = self._values.get(key)
        self._touch(key)
        return value

    def put(self, key: K, value: V) -> V:
        """Keep a value; the one that was used the longest ago makes room."""
        self._values[key] = value
        self._touch(key)
        if len(self._values) > self.most:
            self._values.popitem(last=False)
        return value

    def _touch(self, key: K) -> None:
        with suppress(KeyError):  # there was none, or another thread has made room
            self._values.move_to_end(key)

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
