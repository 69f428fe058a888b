"""The three stages behind Ray Serve handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve.work import Decoded, Frame, Job, Latents, Permit, Timed, Tokens


@dataclass(frozen=True)
class RemotePermit:
    """A `Permit` that travels: asks the API deployment, which knows the orchestrators."""

    api: DeploymentHandle
    job_id: str

    async def __call__(self, index: int) -> bool:
        return await self.api.may_plan.remote(self.job_id, index)


class HandleStages:
    """`Stages` that run in other deployments. A call that is cancelled here is cancelled there."""

    def __init__(
        self, ar: DeploymentHandle | None, dit: DeploymentHandle, decoder: DeploymentHandle, api: DeploymentHandle
    ) -> None:
        """`api` is the deployment that owns this object; its `may_plan` leads back to `may_plan` here.

        Without `ar` only baselines can be made, which are not planned.
        """
        self._ar = ar.options(stream=True) if ar is not None else None
        self._dit, self._decoder, self._api = dit, decoder, api
        self._permits: dict[str, Permit] = {}

    async def may_plan(self, job_id: str, index: int) -> bool:
        """What a plan asks before its segment `index`. False for plans of an earlier process or a cancelled job."""
        permit = self._permits.get(job_id)
        return await permit(index) if permit else False

    async def plan(self, job: Job, permit: Permit) -> AsyncIterator[Timed[Tokens]]:
        """Ray's streams have no back pressure: the replica asks before it plans a segment instead."""
        if self._ar is None:
            raise RuntimeError("this service has no AR: only baselines can be made")
        self._permits[job.id] = permit
        stream: Any = self._ar.plan.remote(job, RemotePermit(self._api, job.id))
        try:
            async for planned in stream:
                yield planned
        finally:
            del self._permits[job.id]
            stream.cancel()

    async def render(self, job: Job, index: int, tokens: Tokens | None, overlap: Latents | None) -> Timed[Latents]:
        """See `Stages`."""
        return await _result(self._dit.render.remote(job, index, tokens, overlap))

    async def decode(self, job: Job, latents: Latents, before: Frame | None) -> Timed[Decoded]:
        """See `Stages`."""
        return await _result(self._decoder.decode.remote(job, latents, before))


async def _result(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
