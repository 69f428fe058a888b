"""Another bundle in place of the one that is served: nothing is lost, and every video is one bundle's."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from arlon_ray.artifact import ArtifactError
from arlon_ray.bundle import load_bundle
from arlon_ray.config import ConfigError
from arlon_ray.generation import DiTRenderer, default_options
from serve import loaded
from serve.api import build_api
from serve.blobs import Blobs
from serve.deployments import DitDeployment
from serve.exchange import Exchange, LastServed, ServedModel, open_model, still_there
from serve.job_store import JobStore
from serve.service import VideoService
from serve.settings import config_of
from serve.work import TRIAL, Frame, Job, Latents, Tokens
from tests.bundles import make_random_bundle
from tests.serve.play import driven, post, until
from tests.serve.stages import FakeStages, small_config

ONE, TWO, BROKEN = "/bundles/one", "/bundles/two", "/bundles/broken"


class BundleStages(FakeStages):
    """Pictures of another brightness for each bundle, and a note of which bundle made what."""

    def __init__(self) -> None:
        super().__init__(small_config())
        self.makers: dict[str, set[str]] = defaultdict(set)

    async def plan(self, job: Job, *arguments: Any, **others: Any) -> Any:
        self.makers[job.id].add(job.bundle)
        async for tokens in super().plan(job, *arguments, **others):
            yield tokens

    async def render(self, job: Job, index: int, *arguments: Any, **others: Any) -> Any:
        self.makers[job.id].add(job.bundle)
        if job.bundle == "broken":
            raise MemoryError("no room for its weights")
        return await super().render(job, index, *arguments, **others)

    async def decode(self, job: Job, index: int, latents: Latents, before: Frame | None) -> Any:
        self.makers[job.id].add(job.bundle)
        return await super().decode(job, index, latents + {"one": 0, "two": 40}.get(job.bundle, 80), before)


class Running:
    """A service with its exchange, and a client."""

    def __init__(self, folder: Path, first: str = ONE, gone: str = "") -> None:
        config, store = small_config("serve.max_running=1"), JobStore.in_folder(folder)
        self.stages = BundleStages()
        self.service = VideoService(config, store, self.stages, Blobs(folder))

        def there(path: str) -> ServedModel:
            if path not in {ONE, TWO, BROKEN} - {gone}:
                raise ArtifactError(f"{path}: not a bundle")
            return ServedModel(config, Path(path).name, path)

        self.exchange = Exchange(self.service, self.stages, LastServed(store.engine), there, first)
        app = build_api(self.service, config, exchange=self.exchange)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    async def want(self, path: str, state: str = "none") -> None:
        """Ask for a bundle, and see what becomes of it."""
        await self.exchange.want({"bundle": path})
        while (await self.health())["change"] == "trying":
            await asyncio.sleep(0.01)
        assert (await self.health())["change"] == state

    async def health(self) -> dict[str, Any]:
        """Of the service."""
        return (await self.client.get("/healthz")).json()

    async def content(self, name: str) -> bytes:
        """The file of a video, as soon as it is finished."""
        video = await until(self.client, name, "completed", "failed")
        assert video["status"] == "completed", video["error"]
        return (await self.client.get(f"/v1/videos/{name}/content")).content


@asynccontextmanager
async def running(folder: Path, wanted: str = ONE, first: str = ONE, gone: str = "") -> AsyncIterator[Running]:
    """The service, until the block ends; the folder `gone` is not there."""
    here = Running(folder, first, gone)
    await here.exchange.want({"bundle": wanted})
    try:
        async with asyncio.timeout(30), here.client:
            yield here
    finally:
        await here.service.close()


async def alone(folder: Path, bundle: str) -> bytes:
    """What a bundle makes of the request where nothing happens meanwhile."""
    async with running(folder, bundle, bundle) as here:
        return await here.content((await post(here.client, prompt="a", num_segments=3, seed=1))["id"])


async def three(here: Running) -> str:
    """Ask for a video of three segments."""
    return (await post(here.client, prompt="a", num_segments=3, seed=1))["id"]


@driven
async def test_what_has_begun_ends_with_its_bundle_and_what_waits_begins_with_the_new_one(tmp_path: Path) -> None:
    ones, twos = await alone(tmp_path / "one", ONE), await alone(tmp_path / "two", TWO)
    assert ones != twos
    async with running(tmp_path / "data") as here:
        here.stages.gate.clear()
        begun = await three(here)
        await until(here.client, begun, "in_progress")
        waits = await three(here)
        here.stages.free.add(TRIAL)
        await here.exchange.want({"bundle": TWO})
        while (await here.health())["bundle"] != "two":
            meanwhile = await three(here)
            await asyncio.sleep(0.02)
        here.stages.gate.set()
        after = await three(here)
        assert [await here.content(name) for name in (begun, waits, meanwhile, after)] == [ones, twos, twos, twos]
        await here.want(ONE)
        assert await here.content(await three(here)) == ones
        videos = (await here.client.get("/v1/videos?limit=100")).json()["data"]
        for video in videos:
            assert here.stages.makers[video["id"]] == {video["bundle"]}
        assert {video["bundle"] for video in videos} == {"one", "two"}


@pytest.mark.parametrize("wanted", [{"bundle": BROKEN}, {"bundle": "/bundles/none"}, {"bundel": TWO}, None])
@driven
async def test_what_cannot_be_served_is_refused_and_the_old_one_goes_on(tmp_path: Path, wanted: Any) -> None:
    async with running(tmp_path) as here:
        await here.exchange.want(wanted)
        while (await here.health())["change"] == "trying":
            await asyncio.sleep(0.01)
        health = await here.health()
        assert (health["change"], health["bundle"], health["status"]) == ("refused", "one", "ok")
        await here.content(await three(here))
        await here.want(TWO)
        assert (await here.health())["bundle"] == "two"
    # what was refused is still what the file says: a new process begins with what was served last
    async with running(tmp_path, BROKEN) as here:
        assert here.service.model.bundle == "two"
        await here.want(BROKEN, "refused")
        await here.content(await three(here))


@driven
async def test_a_newer_wish_takes_the_place_of_one_that_is_being_tried(tmp_path: Path) -> None:
    async with running(tmp_path) as here:
        here.stages.gate.clear()
        await here.exchange.want({"bundle": BROKEN})
        await here.exchange.want({"bundle": TWO})
        here.stages.gate.set()
        await here.want(TWO)
        assert (await here.health())["bundle"] == "two"


@driven
async def test_what_is_noted_is_what_is_served_where_a_wish_comes_while_it_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as here:
        (begun, go_on, written), write = (threading.Event() for _ in range(3)), LastServed.write

        def slow(served: LastServed, path: str) -> None:
            begun.set()
            assert go_on.wait(10)
            write(served, path)
            written.set()

        monkeypatch.setattr(LastServed, "write", slow)
        await here.exchange.want({"bundle": TWO})
        await asyncio.to_thread(begun.wait, 10)
        back = asyncio.create_task(here.want(ONE))
        await asyncio.sleep(0.05)
        go_on.set()
        await back
        await asyncio.to_thread(written.wait, 10)
        assert (await here.health())["bundle"] == "one"
        assert here.exchange._served.read() == ONE


@pytest.mark.parametrize("there", [True, False])
@driven
async def test_after_a_crash_each_goes_on_with_its_bundle_or_begins_again(
    tmp_path: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones, twos = await alone(tmp_path / "one", ONE), await alone(tmp_path / "two", TWO)
    async with running(tmp_path / "data") as here:
        here.stages.hang_at(1)
        begun = await three(here)
        while (await here.client.get(f"/v1/videos/{begun}")).json()["segments"][0]["status"] != "completed":
            await asyncio.sleep(0.01)
        waits = await three(here)
    monkeypatch.setattr("serve.making.still_there", lambda job, config: there and job.bundle_path == ONE)
    async with running(tmp_path / "data", TWO, TWO, gone=ONE) as here:
        contents = [await here.content(name) for name in (begun, waits)]
        lines = (await here.client.get(f"/v1/videos/{begun}/events")).text.splitlines()
        assert all(len(makers) == 1 for makers in here.stages.makers.values())
    assert contents == [ones if there else twos, twos]
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds.count("restarted") == (0 if there else 1)
    assert kinds.count("segment.completed") == (3 if there else 4) and kinds[-1] == "completed"


@driven
async def test_a_bundle_that_goes_while_it_is_needed_costs_no_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that starts anew cannot load it: the video is made again, with the one that is served."""
    monkeypatch.setattr("serve.making.still_there", lambda job, config: False)
    twos = await alone(tmp_path / "two", TWO)
    async with running(tmp_path / "data") as here:
        plain, reached, go_on = here.stages.render, asyncio.Event(), asyncio.Event()

        async def render(job: Job, index: int, *arguments: Any, **others: Any) -> Any:
            if job.bundle == "one" and index == 1:
                reached.set()
                await go_on.wait()
                raise FileNotFoundError(ONE)
            return await plain(job, index, *arguments, **others)

        here.stages.render = render  # type: ignore[method-assign]
        begun = await three(here)
        await reached.wait()
        await here.want(TWO)
        go_on.set()
        assert await here.content(begun) == twos
        assert [index for name, index in here.stages.rendered if name == begun] == [0, 0, 1, 2]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of one shape, whose weights differ."""
    folder = tmp_path_factory.mktemp("bundles")
    return make_random_bundle(folder / "one"), make_random_bundle(folder / "two", "ar.dim=64", "dit.hidden_size=64")


@driven
async def test_a_replica_loads_what_a_job_needs_and_forgets_what_nobody_does(
    bundles: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [load_bundle(path) for path in bundles]
    replica = DitDeployment(str(bundles[0]), "cpu", 1, 2)
    options = default_options(here[0].config.sampling, steps=2)
    tokens: Tokens = np.zeros((10, 4, 4), np.int32)
    jobs = [Job("v", ("a",), 0, options, bundle=each.fingerprint, bundle_path=str(each.path)) for each in here]
    made = await asyncio.gather(*(replica.render(job, 0, tokens, None) for job in [*jobs, *jobs]))
    for bundle, latents in zip([*here, *here], made, strict=True):
        alone = DiTRenderer(bundle).render("a", tokens, None, 0, 0, options)
        assert np.array_equal(latents.value, alone.latents)
    assert len(list(replica._models)) == 2
    replica.check_health()
    assert len(list(replica._models)) == 2  # an earlier one's videos have pauses
    monkeypatch.setattr(loaded, "KEEP_S", 0.0)
    await replica.render(jobs[1], 0, tokens, None)
    threads = [each._thread for each in replica._models]
    replica.check_health()
    (left,) = replica._models
    assert left.model.bundle.fingerprint == here[1].fingerprint
    threads[0].join(5)
    assert not threads[0].is_alive()
    moved = replace(jobs[0], bundle_path=str(bundles[1]))
    with pytest.raises(ArtifactError, match="needs"):
        await replica.render(moved, 0, tokens, None)
    again = await replica.render(jobs[0], 0, tokens, None)
    assert np.array_equal(again.value, made[0].value)


@driven
async def test_a_replica_that_starts_when_its_first_bundle_is_gone_waits_for_a_call(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    bundle = load_bundle(bundles[1])
    replica = DitDeployment(str(tmp_path / "gone"), "cpu", 1, 2)
    replica.check_health()
    options = default_options(bundle.config.sampling, steps=1)
    job = Job("v", ("a",), 0, options, bundle=bundle.fingerprint, bundle_path=str(bundle.path))
    made = await replica.render(job, 0, np.zeros((10, 4, 4), np.int32), None)
    assert made.value.shape[1] == bundle.config.segment.latents


def test_only_a_bundle_of_the_same_shape_is_exchanged(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    one = load_bundle(bundles[0])
    settings = ["sampling.steps=7", "serve.max_running=3"]
    model = open_model(str(bundles[1]), lambda bundle: config_of(bundle, None, settings), one.config)
    assert (model.config.sampling.steps, model.bundle) == (7, load_bundle(bundles[1]).fingerprint)
    assert model.config.serve == one.config.serve  # what the deployments were built with
    job = Job("v", ("a",), 0, default_options(one.config.sampling), bundle=one.fingerprint, bundle_path=str(one.path))
    assert still_there(job, model.config)
    assert not still_there(replace(job, bundle_path=str(bundles[1])), model.config)
    assert not still_there(replace(job, bundle_path=str(tmp_path)), model.config)
    assert not still_there(replace(job, bundle_path=""), model.config)
    wide = make_random_bundle(tmp_path / "wide", "segment.groups=3")
    with pytest.raises(ConfigError, match=r"segment differs .*args\.bundle"):
        open_model(str(wide), lambda bundle: bundle.config, one.config)
    assert not still_there(job, load_bundle(wide).config)
