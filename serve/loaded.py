"""The bundles that a replica has in memory: one, and two while videos that an earlier one began are being made."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError
from arlon_ray.bundle import MANIFEST, Bundle, load_bundle
from arlon_ray.offload import Offload
from serve.work import TRIAL, Job

logger = getLogger("ray.serve")

#: A bundle that no call has needed for so long is forgotten, unless it is the one that was needed last.
KEEP_S = 120.0


class Closing(Protocol):
    """What is made of a bundle."""

    def check(self) -> None:
        """Raises RuntimeError if it can do nothing any more."""

    def close(self) -> None:
        """Nobody needs it any more."""


M = TypeVar("M", bound=Closing)


@dataclass
class _Held(Generic[M]):
    model: M
    calls: int = 0  # at work with it now
    needed: float = field(default_factory=time.monotonic)


class LoadedModels(Generic[M]):
    """What a replica's calls work with: that of the bundle which makes their job, loaded when it is first needed."""

    def __init__(self, make: Callable[[Bundle], M], device: str, first: str, offload: Offload = "none") -> None:
        """`make` takes what it needs from a bundle. That of the folder `first` is loaded now; `offload`: see `Bundle`.

        If that folder is gone (it was served, and is no more), calls say which one they need. Raises ArtifactError.
        """
        self._make, self._device, self._offload = make, device, offload
        self._latest = ""  # what a video needed last: not one that is only tried
        self._held: dict[str, _Held[M]] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        if mirror.exists(Path(first) / MANIFEST):
            bundle, made = self._load(first)
            self._held[bundle] = _Held(made)
            self._latest = bundle
        else:
            logger.warning("%s is gone: the bundle that is served is loaded with the first call", first)

    def __iter__(self) -> Iterator[M]:
        return iter([held.model for held in self._held.values()])

    @asynccontextmanager
    async def of(self, job: Job) -> AsyncIterator[M]:
        """The model that makes `job`; any, if it names no bundle. Raises ArtifactError, and what loading raises."""
        if job.bundle and job.bundle not in self._held:
            await self._fetch(job)
        # no `await` since it was seen: it cannot be forgotten in between
        held = self._held[job.bundle or next(iter(self._held))]
        held.calls += 1
        if job.bundle and job.id != TRIAL:
            self._latest = job.bundle
        try:
            yield held.model
        finally:
            held.calls -= 1
            held.needed = time.monotonic()

    def check(self) -> None:
        """What Serve asks for now and then: also the time to forget. Raises RuntimeError if a model is broken."""
        self.forget(KEEP_S)
        for model in self:
            model.check()

    def forget(self, unused_s: float) -> None:
        """Let go of what no call has needed for so long, but never of what a video needed last."""
        names = [
            name for name, held in self._held.items()
            if name != self._latest and not held.calls and time.monotonic() - held.needed > unused_s
        ]  # fmt: skip
        for name in names:
            self._held.pop(name).model.close()
        if names:
            gc.collect()
            if self._device == "cuda":
                torch.cuda.empty_cache()

    async def _fetch(self, job: Job) -> None:
        """Load a bundle beside the others. Calls that need the same one wait together."""
        if job.bundle not in self._loading:
            self.forget(0.0)  # a third one has no room
            # an empty context: the call that is the first to need it may be cancelled
            loading = asyncio.create_task(self._load_beside(job), context=contextvars.Context())
            self._loading[job.bundle] = loading
            loading.add_done_callback(lambda _: self._loading.pop(job.bundle))
        await asyncio.shield(self._loading[job.bundle])

    async def _load_beside(self, job: Job) -> None:
        bundle, made = await asyncio.to_thread(self._load, job.bundle_path)
        if bundle != job.bundle:
            made.close()
            raise ArtifactError(f"{job.bundle_path} is {bundle[:12]}…, but {job.id} needs {job.bundle[:12]}…")
        self._held[bundle] = _Held(made)

    def _load(self, path: str) -> tuple[str, M]:
        bundle = load_bundle(path, self._device, self._offload)
        return bundle.fingerprint, self._make(bundle)
