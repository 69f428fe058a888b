"""One thread that runs a batch of requests; callers await what comes of theirs."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from logging import getLogger
from typing import Any, Generic, TypeVar

import torch

from arlon_ray.generation.batching import Batch, Member
from arlon_ray.heap import keep_freed_memory
from serve.work import Timed

T = TypeVar("T")
M = TypeVar("M", bound=Member)
logger = getLogger("ray.serve")


class Cancelled(RuntimeError):
    """The request was cancelled: raised in the model's thread before its next denoising step or token."""


class _Ticket(Generic[M]):
    """One request on its way through the batch. The thread and the event loop meet here."""

    def __init__(self, make: Callable[[], Generator[M, Any, Any]]) -> None:
        self.make, self.loop = make, asyncio.get_running_loop()
        self.future: asyncio.Future[Timed[Any]] = self.loop.create_future()
        self.cancelled = threading.Event()
        self.request: Generator[M, Any, Any] | None = None
        self.started, self.clock = 0.0, 0.0

    def begin(self) -> M:
        """Start the request: its first member."""
        self.started, self.clock = time.time(), time.perf_counter()
        self.request = self.make()
        return next(self.request)

    def go_on(self, member: M) -> M:
        """Hand it what came of a member: its next. StopIteration holds the request's result."""
        assert self.request is not None
        return self.request.send(member.result)

    def resolve(self, value: Any = None, error: BaseException | None = None) -> None:
        """Tell the caller, if it still waits."""
        timed = Timed(value, self.started, time.perf_counter() - self.clock)
        if self.request is not None:
            self.request.close()

        def tell() -> None:
            if self.future.done():
                return
            if error is None:
                self.future.set_result(timed)
            else:
                self.future.set_exception(error)

        with suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self.loop.call_soon_threadsafe(tell)


class Watch:
    """Notices work that does not end: a device that hangs would hold the videos that wait for it for ever."""

    def __init__(self, limit_s: float | None = None) -> None:
        """`limit_s`: how long one piece of work may take; None: as long as it likes."""
        self._limit_s = limit_s
        self._begun: dict[int, float] = {}  # by thread

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """This thread is at work within the block, on one piece."""
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            yield
        finally:
            del self._begun[thread]

    def check(self) -> None:
        """Raises RuntimeError if a piece has been at work for too long, and logs where it is."""
        begun = dict(self._begun)
        if self._limit_s is None or not begun:
            return
        thread = min(begun, key=begun.__getitem__)
        taken_s = time.monotonic() - begun[thread]
        if taken_s <= self._limit_s:
            return
        if (frame := sys._current_frames().get(thread)) is not None:
            logger.error("a step does not end; it is here:\n%s", "".join(traceback.format_stack(frame)))
        raise RuntimeError(f"a step has not ended for {taken_s:.0f} s (serve.stuck_s={self._limit_s:g})")


class BatchWorker(Generic[M]):
    """A replica's model and the one thread that runs it, with `threads` threads of torch.

    Requests wait in line until the batch has room, join, and leave, between steps.
    """

    def __init__(self, threads: int, stuck_s: float | None = None) -> None:
        """`stuck_s`: how long one step may take, see `check`."""
        keep_freed_memory()
        self._threads, self._watch = threads, Watch(stuck_s)
        self._batch: Batch[M] | None = None
        self._line: deque[_Ticket[M]] = deque()
        self._active: dict[int, tuple[M, _Ticket[M]]] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._calls: deque[Callable[[], None]] = deque()
        #: How many members each step so far had, at most the last thousand.
        self.sizes: deque[int] = deque(maxlen=1000)
        self._thread = threading.Thread(target=self._run, name="arlon-batch", daemon=True)
        self._thread.start()

    def now(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run in the thread, between two steps, and block."""
        done: list[T] = []
        errors: list[BaseException] = []
        ready = threading.Event()

        def run() -> None:
            try:
                done.append(call(*arguments))
            except BaseException as error:
                errors.append(error)
            ready.set()

        with self._changed:
            self._calls.append(run)
            self._changed.notify()
        ready.wait()
        if errors:
            raise errors[0]
        return done[0]

    def check(self) -> None:
        """Raises RuntimeError if the thread has died, or a step does not end."""
        if not self._thread.is_alive():
            raise RuntimeError("the thread that runs the model has died")
        self._watch.check()

    def close(self) -> None:
        """End the thread. Nobody may wait for anything, or ask again."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def use(self, batch: Batch[M]) -> None:
        """Run this batch from now on."""
        self._batch = batch

    async def run(self, make: Callable[[], Generator[M, Any, T]]) -> Timed[T]:
        """What comes of a request, which `make` makes in the thread.

        If the caller is cancelled it leaves the batch before its next step.
        """
        ticket = _Ticket(make)
        with self._changed:
            self._line.append(ticket)
            self._changed.notify()
        try:
            return await ticket.future
        finally:
            ticket.cancelled.set()

    def _run(self) -> None:
        # OpenMP's limit holds for the thread that sets it
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ended or self._calls or (self._batch and (self._line or self._active))
                )
            if self._ended:
                return
            while self._calls:
                self._calls.popleft()()
            if self._batch is not None:
                with self._watch.at_work():
                    self._drop_cancelled(self._batch)
                    self._admit(self._batch)
                    if self._active:
                        self._step(self._batch)

    def _drop_cancelled(self, batch: Batch[M]) -> None:
        for member, ticket in list(self._active.values()):
            if ticket.cancelled.is_set():
                self._leave(batch, member)
                ticket.resolve(error=Cancelled())

    def _leave(self, batch: Batch[M], member: M) -> None:
        del self._active[id(member)]
        batch.leave(member)

    def _admit(self, batch: Batch[M]) -> None:
        while self._line and batch.has_room():
            ticket = self._line.popleft()
            if not ticket.cancelled.is_set():
                self._enter(batch, ticket, ticket.begin)

    def _enter(self, batch: Batch[M], ticket: _Ticket[M], following: Callable[[], M]) -> None:
        """Take the request's next member into the batch, or hand its result to the caller."""
        try:
            member = following()
            while True:
                batch.join(member)
                if not member.ended:
                    break
                member = ticket.go_on(member)
            self._active[id(member)] = member, ticket
        except StopIteration as ended:
            ticket.resolve(ended.value)
        except BaseException as error:
            ticket.resolve(error=error)

    def _step(self, batch: Batch[M]) -> None:
        self.sizes.append(len(self._active))
        try:
            ended = batch.step()
        except BaseException as error:
            # not one member's own: nobody knows whose, and none of them can go on
            for member, ticket in list(self._active.values()):
                self._leave(batch, member)
                ticket.resolve(error=error)
            return
        for member in ended:
            _, ticket = self._active.pop(id(member))
            self._enter(batch, ticket, partial(ticket.go_on, member))
