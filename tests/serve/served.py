"""The service behind its guard on a real HTTP server: uvicorn in a thread, stages that draw plain pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve.api import build_api
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.keys import KeyCheck, Keys
from serve.service import VideoService
from tests.serve.live import answering
from tests.serve.stages import FakeStages, small_config


@dataclass(frozen=True)
class Served:
    """Where it listens, two keys, and its API's description."""

    url: str
    port: int
    user: dict[str, str]
    admin: dict[str, str]
    openapi: dict[str, Any]

    def client(self) -> httpx.Client:
        """Of the user."""
        return httpx.Client(base_url=self.url, headers=self.user, timeout=20)


@contextmanager
def served(folder: Path, *overrides: str, database: str | None = None, hold: bool = False) -> Iterator[Served]:
    """Serve until the block ends. Keys are on, and their rate is out of the way. With `hold` no video ends."""
    config = small_config("serve.auth=on", "serve.requests_per_minute=1000000", *overrides)
    store = JobStore.opened(database, folder)
    keys = Keys(store.engine)
    user, admin = ({"authorization": f"Bearer {key}"} for key in (keys.add("ann"), keys.add("root", "admin")))
    stages = FakeStages(config)
    if hold:
        stages.gate.clear()
    service = VideoService(config, store, stages, Blobs(folder), None)
    app = build_api(service, config, KeyCheck(keys))
    with answering(app) as url:
        yield Served(url, int(url.rsplit(":", 1)[1]), user, admin, openapi=app.openapi())
