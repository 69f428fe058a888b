"""What a tenant may have: refused with the quota's name, and counted."""

from __future__ import annotations

import asyncio
import math
import time
from typing import NamedTuple

from arlon_ray.config import ServeConfig
from serve.job_store import DAY_S, JobStore
from serve.metrics import Metrics
from serve.schema import RequestError

OTHER = "other"


class Refusal(NamedTuple):
    """Why a request is refused."""

    message: str
    code: str


def queue_refusal(
    settings: ServeConfig, tenant: str, waiting: int, own_waiting: int, running: int, own_running: int
) -> Refusal | None:
    """Why nothing more of a tenant may wait, when so many do and so many are being made, in all and of its own."""
    quota, free = settings.tenant(tenant), settings.most_running - running
    own_free = free if quota.max_running is None else max(0, min(free, quota.max_running - own_running))
    if waiting >= settings.max_queued + free:
        return Refusal(f"{waiting} videos are waiting already (max_queued {settings.max_queued})", "queue_full")
    name, most = most_queued(settings, tenant)
    if own_waiting >= most + own_free:
        return Refusal(f"{own_waiting} videos of {tenant} are waiting already ({name} {most})", "too_many_queued")
    return None


def most_queued(settings: ServeConfig, tenant: str) -> tuple[str, int]:
    """Which setting says how many of a tenant may wait, and how many it says."""
    own = settings.tenant(tenant).max_queued
    return ("max_queued_per_key", settings.max_queued_per_key) if own is None else ("max_queued", own)


def retry_after(settings: ServeConfig, mean_video_s: float) -> int:
    """Seconds after which a queue that is full may have room, if a video takes so long."""
    return max(1, math.ceil(mean_video_s / settings.most_running))


def label(settings: ServeConfig, tenant: str) -> str:
    """A tenant's name in metrics: its own if the configuration names it, so that there are only so many."""
    return tenant if tenant in settings.tenants else OTHER


class Quotas:
    """The quotas of all tenants but those of the queue, which the queue itself knows."""

    def __init__(self, settings: ServeConfig, store: JobStore, metrics: Metrics) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics

    async def check_stored(self, tenant: str) -> None:
        """Raises RequestError (403) for a tenant that keeps as much as it may."""
        most = self._settings.tenant(tenant).max_stored_bytes
        if most is None:
            return
        _, stored = await asyncio.to_thread(self._store.used, tenant)
        if stored >= most:
            message = f"the videos of {tenant} have {stored} bytes, at most {most} (max_stored_bytes): delete some"
            raise self.refusal(tenant, message, "storage_quota_exceeded", status=403)

    def per_day(self, tenant: str) -> int | None:
        """Segments that may be accepted in a day."""
        return self._settings.tenant(tenant).segments_per_day

    def day_used(self, tenant: str, segments: int) -> RequestError:
        """For a request that the day has no room for: 429 until tomorrow, or 403 if no day has."""
        most = self.per_day(tenant)
        message = f"{segments} segments more are over the {most} of {tenant} for a day (segments_per_day)"
        if most is not None and segments > most:
            return self.refusal(tenant, message, "daily_quota_exceeded", status=403)
        tomorrow_s = math.ceil(DAY_S - time.time() % DAY_S)
        message += ": the next day begins at 0:00 UTC"
        return self.refusal(tenant, message, "daily_quota_exceeded", retry_after_s=tomorrow_s)

    def refusal(
        self, tenant: str, message: str, code: str, *, status: int = 429, retry_after_s: int | None = None
    ) -> RequestError:
        """The error of a request that is refused for what its tenant, or all of them, may have."""
        self._metrics.refused(label(self._settings, tenant), code)
        return RequestError(message, code=code, status=status, retry_after_s=retry_after_s)
