"""Another bundle in place of the one that is served, while requests come in: none is refused, and none is lost.

The new one is tried first: one segment with one step, through every stage, which also loads it there. If that goes
well, what is asked for and what waits is made with it; what has begun ends with the bundle that began it. If it does
not, the old one goes on, and the log says why.
"""

from __future__ import annotations

import asyncio
import contextvars
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Engine
from sqlalchemy.orm import Mapped, Session, mapped_column

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError
from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.config import Config, ConfigError
from arlon_ray.generation import default_options
from arlon_ray.models.text import load_token_counter
from serve.blobs import Blobs
from serve.job_files import JobFiles
from serve.job_store import Base
from serve.metrics import Metrics, Stage
from serve.orchestrator import Orchestrator, StageError
from serve.schema import SegmentStatus
from serve.tracing import span
from serve.work import TRIAL, Job, Stages, Timed

logger = getLogger("ray.serve")

#: What must be the same: what was accepted is of this shape, and the deployments are built for it.
_SHAPE = ("video", "segment", "text")


class Wanted(BaseModel):
    """`user_config` of the API's deployment in the file: the bundle that is to be served."""

    model_config = ConfigDict(extra="forbid")

    bundle: str


@dataclass(frozen=True)
class ServedModel:
    """A bundle as it is served: its fingerprint, its folder, and the configuration that requests are read with."""

    config: Config
    bundle: str = ""
    path: str = ""
    count_tokens: Callable[[str], int] | None = None


def open_model(path: str, configured: Callable[[Bundle], Config], like: Config) -> ServedModel:
    """The bundle at `path`, to be served in place of one with the configuration `like`.

    How it is deployed stays as it is; sampling settings are its own, as `configured` changes them. Raises
    ArtifactError, and ConfigError if it makes videos of another shape.
    """
    bundle = load_bundle(path)
    bundle.check_text()
    config = configured(bundle).model_copy(update={"serve": like.serve, "device": like.device})
    if different := _difference(config, like):
        raise ConfigError(f"{path}: {different} differs from what is served: deploy it with `args.bundle` instead")
    return ServedModel(config, bundle.fingerprint, path, load_token_counter(config.text))


def _difference(one: Config, other: Config) -> str | None:
    if one.sampling.baseline != other.sampling.baseline:
        return "whether there is an AR"
    # where a bundle lies is no difference
    shapes = [config.model_dump(include={*_SHAPE}, exclude={"text": {"path"}}) for config in (one, other)]
    return next((name for name in _SHAPE if shapes[0][name] != shapes[1][name]), None)


def still_there(job: Job, config: Config) -> bool:
    """Whether the bundle that has begun a job is where it was, and fits what is served with `config`. Blocks."""
    try:
        bundle = load_bundle(job.bundle_path) if job.bundle_path else None
    except ArtifactError:
        return False
    return bundle is not None and bundle.fingerprint == job.bundle and not _difference(bundle.config, config)


async def try_out(model: ServedModel, stages: Stages) -> None:
    """Make one segment with one step. Raises StageError."""
    options = default_options(model.config.sampling, steps=1)
    job = Job(TRIAL, ("a trial",), 0, options, bundle=model.bundle, bundle_path=model.path)
    with tempfile.TemporaryDirectory(prefix="arlon-trial-") as folder:
        files = JobFiles(Blobs(Path(folder)), job.id)
        with span("trial", job=TRIAL):
            await Orchestrator(job, stages, files, _Nobody(), config=model.config, planned_ahead=1).run()


class _Nobody:
    """A `Watcher` for what nobody watches."""

    async def started(self, done: int) -> None: ...

    async def segment(
        self, index: int, status: SegmentStatus, stage: Stage | None = None, times: Timed | None = None
    ) -> None: ...

    async def step(self, index: int, step: int) -> None: ...


class _ServedRow(Base):
    __tablename__ = "served"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # there is one row
    path: Mapped[str]


class LastServed:
    """The bundle that was served last, for a service that starts again. Methods block."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(self) -> str | None:
        """Its folder."""
        with Session(self._engine) as session:
            row = session.get(_ServedRow, 1)
            return row.path if row else None

    def write(self, path: str) -> None:
        """It is served from now on."""
        with Session(self._engine) as session, session.begin():
            session.merge(_ServedRow(number=1, path=path))


class Service(Protocol):
    """What an exchange needs of the service."""

    metrics: Metrics

    @property
    def model(self) -> ServedModel:
        """What is served now."""

    async def use(self, model: ServedModel) -> None:
        """Serve it from now on."""

    async def own(self) -> None:
        """Be the one that makes the jobs of its database. Raises OwnerError."""

    async def start(self) -> None:
        """Begin to work."""


class Exchange:
    """Gives a service the bundle that it is to serve, and the next one."""

    def __init__(
        self, service: Service, stages: Stages, served: LastServed, opened: Callable[[str], ServedModel], first: str
    ) -> None:
        """`opened` is `open_model` of a path; `first` the bundle that the application was built for."""
        self._service, self._stages, self._served = service, stages, served
        self._opened, self._first = opened, first
        self._started = False
        self._task: asyncio.Task[None] | None = None
        self._one_wish = asyncio.Lock()
        #: "none", "trying" or "refused": what became of the latest wish.
        self.state = "none"

    async def want(self, user_config: Any) -> None:
        """Serve the bundle that a `user_config` names, as soon as it has been tried. Never raises once work has begun.

        At first the service starts with what was served last, if that is still there: what is wanted may be just what
        was refused before.
        """
        async with self._one_wish:
            await self._want(user_config)

    async def _want(self, user_config: Any) -> None:
        if not self._started:
            await self._begin()
        try:
            wanted = str(mirror.local(Wanted.model_validate(user_config).bundle).expanduser().absolute())
        except ValueError as error:
            return self._refuse(str(user_config), error)
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        if wanted == self._service.model.path:
            self.state = "none"
            return None
        self.state = "trying"
        self._task = asyncio.create_task(self._change_to(wanted), context=contextvars.Context())

    async def _begin(self) -> None:
        await self._service.own()  # before anything is written
        last = await asyncio.to_thread(self._served.read)
        model = None
        if last is not None and last != self._first:
            with suppress(ArtifactError, ConfigError):
                model = await asyncio.to_thread(self._opened, last)
        if model is None:
            model = await asyncio.to_thread(self._opened, self._first)
        await self._use(model)
        await self._service.start()
        self._started = True

    async def _change_to(self, wanted: str) -> None:
        logger.info("%s: is tried", wanted)
        try:
            model = await asyncio.to_thread(self._opened, wanted)
            await try_out(model, self._stages)
            use = asyncio.create_task(self._use(model))
            try:
                await asyncio.shield(use)
            finally:  # what is served and what is noted are one, also where a newer wish comes between
                await asyncio.wait([use])
        except (ArtifactError, ConfigError, StageError) as error:
            self._refuse(wanted, error)
        except Exception as error:
            logger.exception("%s: could not be tried", wanted)
            self._refuse(wanted, error)
        else:
            self.state = "none"
            self._service.metrics.exchanged("done")
            logger.info("%s is served from now on (%s)", wanted, model.bundle[:12])

    async def _use(self, model: ServedModel) -> None:
        await asyncio.to_thread(self._served.write, model.path)
        await self._service.use(model)

    def _refuse(self, wanted: str, error: Exception) -> None:
        self.state = "refused"
        self._service.metrics.exchanged("refused")
        cause = error.__cause__ or error
        logger.error("%s: refused, %s goes on: %s (%s)", wanted, self._service.model.path, error, cause)
