"""The three stages behind Ray Serve handles."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from logging import getLogger
from typing import Any

from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from serve.work import Decoded, Frame, Job, Latents, Permit, Timed, Tokens, Told, WorkerLost

_LOST = (
    RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, DeploymentUnavailableError,
    ReplicaUnavailableError,
)  # fmt: skip


logger = getLogger("ray.serve")


@dataclass(frozen=True)
class _Remote:
    """Something of the API deployment that travels with a call.

    A handle that arrives with each call would be a router of its own at its first use, which Ray keeps, with work
    several times a second, as long as the process lives: what arrives shares one.
    """

    api: DeploymentHandle
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (type(self), self.api.deployment_name, self.api.app_name, self.name)


def _arrived(kind: type[_Remote], deployment: str, app: str, name: str) -> _Remote:
    return kind(_handle(deployment, app), name)


@cache
def _handle(deployment: str, app: str) -> DeploymentHandle:
    return DeploymentHandle(deployment, app)


class RemotePermit(_Remote):
    """A `Permit` that travels: asks the API deployment, which knows the orchestrators.

    Its name is that of the plan that asks: not every plan of a job is one that somebody still waits for.
    """

    async def __call__(self, index: int) -> int:
        return await self.api.may_plan.remote(self.name, index)


class RemoteTold(_Remote):
    """A `Told` that travels; its name is that of the rendering."""

    async def __call__(self, index: int, step: int) -> None:
        await self.api.told.remote([(self.name, index, step)])


async def tell_together(news: Sequence[tuple[Told, int, int]]) -> None:
    """Tell (who, segment, step) of many renderings: all that go to the API in one call."""
    far = [(told, index, step) for told, index, step in news if isinstance(told, RemoteTold)]
    if far:  # there is one API
        await far[0][0].api.told.remote([(told.name, index, step) for told, index, step in far])
    for told, index, step in news:
        if not isinstance(told, RemoteTold):
            await told(index, step)


class HandleStages:
    """`Stages` that run in other deployments. A call that is cancelled here is cancelled there."""

    def __init__(
        self, ar: DeploymentHandle | None, dit: DeploymentHandle, decoder: DeploymentHandle, api: DeploymentHandle
    ) -> None:
        """`api` is the deployment that owns this object; its `may_plan` and `told` lead back to those here.

        Without `ar` only baselines can be made, which are not planned.
        """
        self._ar = ar.options(stream=True) if ar is not None else None
        self._dit, self._decoder, self._api = dit, decoder, api
        self._permits: dict[str, Permit] = {}
        self._told: dict[str, Told] = {}

    async def may_plan(self, plan: str, index: int) -> int:
        """What a plan asks before its segment `index`; see `Permit`. 0 for plans that nobody waits for any more."""
        permit = self._permits.get(plan)
        return await permit(index) if permit else 0

    async def told(self, news: Sequence[tuple[str, int, int]]) -> None:
        """What renderings tell: (which, segment, step)."""
        for rendering, index, step in news:
            if told := self._told.get(rendering):
                try:
                    await told(index, step)
                except Exception:  # of one video: the others' news are told all the same
                    logger.exception("what a rendering told could not be passed on")

    async def plan(
        self, job: Job, permit: Permit, planned: Sequence[Tokens] = (), given: Latents | None = None
    ) -> AsyncIterator[Timed[Tokens]]:
        """Ray's streams have no back pressure: the replica asks before it plans segments instead."""
        if self._ar is None:
            raise RuntimeError("this service has no AR: only baselines can be made")
        name = uuid.uuid4().hex
        self._permits[name] = permit
        stream: Any = self._ar.plan.remote(job, RemotePermit(self._api, name), planned, given)
        try:
            with _losses():
                async for each in stream:
                    yield each
        finally:
            del self._permits[name]
            stream.cancel()

    async def render(
        self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None, told: Told | None = None
    ) -> Timed[Latents]:
        """See `Stages`."""
        name = uuid.uuid4().hex
        if told is not None:
            self._told[name] = told
        try:
            remote = RemoteTold(self._api, name) if told is not None else None
            return await _result(self._dit.render.remote(job, index, tokens, overlap, remote))
        finally:
            self._told.pop(name, None)

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        """See `Stages`."""
        return await _result(self._decoder.decode.remote(job, index, latents, before))

    async def preview(self, job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
        """See `Stages`."""
        return await _result(self._decoder.preview.remote(job, index, tokens, before))

    async def encode(self, job: Job, picture: Frame) -> Timed[Latents]:
        """See `Stages`."""
        return await _result(self._decoder.encode.remote(job, picture))


async def _result(response: Any) -> Any:
    try:
        with _losses():
            return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


@contextmanager
def _losses() -> Iterator[None]:
    """Ray's words for a replica that is gone, in ours."""
    try:
        yield
    except _LOST as error:
        raise WorkerLost(type(error).__name__) from error
