"""Work that many requests share: each joins and leaves between two steps, and one alone is a batch of one."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Generic, Protocol, TypeVar

Result = TypeVar("Result")


class Member(Generic[Result]):
    """One request's part in a batch, until it has a result or has failed."""

    def __init__(self) -> None:
        self._result: list[Result] = []
        self.error: BaseException | None = None

    @property
    def ended(self) -> bool:
        """Whether there is a result or an error."""
        return bool(self._result) or self.error is not None

    def end(self, result: Result) -> None:
        """Hand in the result."""
        self._result.append(result)

    @property
    def result(self) -> Result:
        """What came of it. Raises what it failed with."""
        if self.error is not None:
            raise self.error
        return self._result[0]


M = TypeVar("M", bound=Member)


class Batch(Protocol[M]):
    """Runs its members step by step. Those that have ended have left."""

    def has_room(self) -> bool:
        """Whether one more may join."""

    def join(self, member: M) -> None:
        """Take it in. An error that is this member's own is raised, and it is not taken in."""

    def step(self) -> list[M]:
        """One step of each; those that ended with it. An error of one member ends that member alone."""

    def leave(self, member: M) -> None:
        """Give it up."""


def run_alone(batch: Batch[M], request: Generator[M, Any, Result]) -> Result:
    """A request's result, with no other beside it. Raises what it failed with.

    A request is a generator: it yields members, one after the other, is sent their results, and returns its own.
    """
    try:
        member = next(request)
        while True:
            batch.join(member)
            while not member.ended:
                batch.step()
            member = request.send(member.result)
    except StopIteration as ended:
        result: Result = ended.value
        return result
    finally:
        request.close()
