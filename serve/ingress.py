"""The HTTP API as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from arlon_ray.bundle import Bundle
from arlon_ray.config import Config
from serve.api import build_api
from serve.blobs import Blobs
from serve.exchange import Exchange, LastServed, open_model
from serve.handles import HandleStages
from serve.job_store import JobStore
from serve.keys import open_keys
from serve.logs import set_up_logging
from serve.service import VideoService

API = "VideoAPI"


@serve.ingress()
class VideoAPI:
    """The ingress. It holds no model, only the text encoder's tokenizer.

    One replica, because the queue and the running jobs live in its memory. What it has accepted lives in the database:
    a replica that takes its place goes on with it. The bundle that it serves can be exchanged (`reconfigure`).
    """

    def __init__(
        self,
        config: Config,
        data: str,
        bundle: str,
        configured: Callable[[Bundle], Config],
        ar: DeploymentHandle | None,
        dit: DeploymentHandle,
        decoder: DeploymentHandle,
    ) -> None:
        own = serve.get_deployment_handle(API, serve.get_replica_context().app_name)
        self._config = config
        self._stages = HandleStages(ar, dit, decoder, own)
        set_up_logging(config.serve.log_format, config.serve.log_level)
        store = JobStore.opened(config.serve.database_url, Path(data))
        self._keys = open_keys(config.serve, store.engine)
        self._service = VideoService(config, store, self._stages, Blobs(data))
        opened = partial(open_model, configured=configured, like=config)
        self._exchange = Exchange(self._service, self._stages, LastServed(store.engine), opened, bundle)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self._service, self._config, self._keys, behind_proxy=True, exchange=self._exchange)

    async def reconfigure(self, user_config: Any) -> None:
        """What Serve calls before the first request, and when `user_config` in the file has changed: see `Exchange`.

        It does not wait for the change: no request comes in meanwhile.
        """
        await self._exchange.want(user_config)

    def check_health(self) -> None:
        """Called by Serve, which puts another replica in the place of one that has lost its jobs."""
        if self._service.lost:
            raise RuntimeError(self._service.lost)

    async def may_plan(self, plan: str, index: int) -> int:
        """Called by the AR's replicas; see `HandleStages.may_plan`."""
        return await self._stages.may_plan(plan, index)

    async def told(self, news: Sequence[tuple[str, int, int]]) -> None:
        """Called by the DiT's replicas; see `HandleStages.told`."""
        await self._stages.told(news)


def bind_api(
    config: Config,
    data: str,
    bundle: str,
    configured: Callable[[Bundle], Config],
    stages: tuple[serve.Application | None, ...],
) -> serve.Application:
    """The ingress over the bound stages; `bundle` is the folder of the one that they begin with."""
    deployment = serve.deployment(
        name=API,
        num_replicas=1,
        # status requests and downloads, not work: the queue of jobs has its own bound
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        user_config={"bundle": bundle},
        graceful_shutdown_timeout_s=5,
        health_check_period_s=2,  # a replica that has lost its jobs is replaced after three
    )(VideoAPI)
    return deployment.bind(config, data, bundle, configured, *stages)
