"""Parts of a bundle that wait in the CPU's memory while others work, for a GPU that cannot hold them all.

What waits is pinned where there is a GPU: moving in does not stop the host, and moving out costs nothing, for frozen
weights need no way back. Parts take turns, so that the device holds the largest of them, not their sum.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

#: text: the text encoder always computes on the CPU; idle: all parts wait there while they do not work; all: both.
Offload = Literal["none", "text", "idle", "all"]


class _Waiting:
    """Where a part's numbers wait, and how many need it now."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self.users = device, 0
        self._tensors: list[Tensor] = list(chain(model.parameters(), model.buffers()))
        pinned = device.type == "cuda"
        self._waiting = [tensor.detach().pin_memory() if pinned else tensor.detach() for tensor in self._tensors]
        self.move_out()

    def move_in(self) -> None:
        """Copies behind which the device's own work stands in line."""
        for tensor, waiting in zip(self._tensors, self._waiting, strict=True):
            tensor.data = waiting.to(self.device, non_blocking=True, copy=True)

    def move_out(self) -> None:
        """Forget the copies. Their memory is free for other processes too."""
        for tensor, waiting in zip(self._tensors, self._waiting, strict=True):
            tensor.data = waiting
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Turns:
    """Parts that take turns on one device. Those that it was not told of are where they are, and need no turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._parts: dict[nn.Module, _Waiting] = {}
        self._changed = threading.Condition()
        self._owner: int | None = None  # the thread whose turn it is
        self._depth = 0

    def waits(self, model: nn.Module) -> None:
        """From now on `model` (on the CPU, frozen) waits there unless it is at work."""
        self._parts[model] = _Waiting(model, self.device)

    @contextmanager
    def at_work(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` is on the device. Waits for the parts that other threads have at work.

        A thread may have several at work at a time, one in the other or one beside the other.
        """
        if (part := self._parts.get(model)) is None:
            yield
            return
        self._take_turn()
        try:
            with self._changed:
                part.users += 1
                if part.users == 1:
                    part.move_in()
            yield
        finally:
            with self._changed:
                part.users -= 1
                if not part.users:
                    part.move_out()
            self._end_turn()

    def _take_turn(self) -> None:
        own = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._owner in (None, own))
            self._owner, self._depth = own, self._depth + 1

    def _end_turn(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._owner = None
                self._changed.notify_all()
