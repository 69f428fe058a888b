"""The jobs of a database are made by one process: a second one is refused, and takes over when the first is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from arlon_ray.bundle import load_bundle
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.api import build_api
from serve.app import serve_bundle
from serve.blobs import Blobs
from serve.exchange import Exchange, LastServed, ServedModel
from serve.job_store import JobStore
from serve.owner import OwnerError, owner_of, owning
from serve.schema import RequestError, RerollRequest, Video, VideoRequest
from serve.service import VideoService
from tests.bundles import make_random_bundle
from tests.postgres import postgres
from tests.serve.play import driven, post, until
from tests.serve.stages import FakeStages, small_config

REQUEST = VideoRequest(prompt="a", num_segments=3, seed=1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(tmp_path_factory.mktemp("postgresql")) as address:
        yield address


@pytest.fixture
def postgresql(server: str) -> str:
    """The address of an empty database of a real server."""
    name = f"of_{uuid.uuid4().hex}"
    run_sql(server, f"CREATE DATABASE {name}")
    return make_url(server).set(database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return request.getfixturevalue("postgresql")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.owner.WAIT_S", 0.3)


def run_sql(database: str, command: str) -> list[Any]:
    engine = create_engine(database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        result = connection.execute(text(command))
        rows = [row[0] for row in result] if result.returns_rows else []
    engine.dispose()
    return rows


def hang_up(database: str) -> None:
    """End the connection that holds the lock."""
    holders = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
    ours = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    assert run_sql(database, f"SELECT pg_terminate_backend(pid) FROM ({holders} AND {ours}) AS held") == [True]


def service_of(database: str, folder: Path) -> tuple[VideoService, FakeStages]:
    config = small_config("serve.max_running=1")
    stages = FakeStages(config)
    return VideoService(config, JobStore(database), stages, Blobs(folder)), stages


async def content(service: VideoService, name: str) -> bytes:
    """The file of a video, as soon as it is finished."""
    while (video := await service.get(name)).status not in ("completed", "failed"):
        await asyncio.sleep(0.01)
    assert video.status == "completed", video.error
    with (await service.content(name)).file as file:
        return file.read()


async def halfway(service: VideoService, stages: FakeStages) -> Video:
    """A video whose second segment is not coming to its end."""
    reached = stages.hang_at(1)
    video = await service.create(REQUEST)
    await reached.wait()
    return video


async def undisturbed(folder: Path) -> bytes:
    folder.mkdir()
    service, _ = service_of(f"sqlite:///{folder / 'jobs.sqlite'}", folder)
    await service.start()
    made = await content(service, (await service.create(REQUEST)).id)
    await service.close()
    return made


@driven
async def test_a_second_one_is_refused_and_the_first_goes_on(database: str, tmp_path: Path, impatient: None) -> None:
    first, stages = service_of(database, tmp_path)
    await first.start()
    video = await halfway(first, stages)
    second, others = service_of(database, tmp_path)
    with pytest.raises(OwnerError, match=rf"made by process {os.getpid()} on .*: end that one first, or name") as error:
        await second.start()
    assert "\n" not in str(error.value)
    await second.close()
    assert (others.planned, others.rendered) == ([], [])
    stages.render = FakeStages.render.__get__(stages)  # type: ignore[method-assign]
    waits = await first.create(REQUEST)
    await first.delete(video.id)
    assert await content(first, waits.id) == await undisturbed(tmp_path / "other")
    await first.close()


@driven
async def test_a_second_one_writes_nothing(tmp_path: Path, impatient: None) -> None:
    database = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    with owning(JobStore(database).engine):
        service, stages = service_of(database, tmp_path)
        served = LastServed(JobStore(database).engine)
        served.write("/first")
        opened = ServedModel(stages.config, "two", "/second")
        with pytest.raises(OwnerError):
            await Exchange(service, stages, served, lambda _: opened, "/second").want({"bundle": "/second"})
        await service.close()
        assert served.read() == "/first"


@driven
async def test_who_comes_next_waits_for_the_end_of_the_one_before(database: str, tmp_path: Path) -> None:
    first, stages = service_of(database, tmp_path)
    await first.start()
    video = await halfway(first, stages)
    second, others = service_of(database, tmp_path)
    starting = asyncio.create_task(second.start())
    await asyncio.sleep(0.5)
    assert not starting.done()
    await first.close()
    await asyncio.wait_for(starting, 5)
    assert await content(second, video.id) == await undisturbed(tmp_path / "other")
    assert [index for _, index in others.rendered] == [1, 2]
    await second.close()


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.serve.test_owner import halfway, service_of

async def main():
    service, stages = service_of(sys.argv[1], Path(sys.argv[2]))
    await service.start()
    print((await halfway(service, stages)).id, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@driven
async def test_a_process_that_was_killed_holds_nothing(
    database: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, database, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as first:
        try:
            assert first.stdout is not None
            name = (await asyncio.to_thread(first.stdout.readline)).strip()
            refused, _ = service_of(database, tmp_path)
            with pytest.raises(OwnerError, match=f"made by process {first.pid} on "):
                await refused.start()
            await refused.close()
        finally:
            first.send_signal(signal.SIGKILL)
    second, stages = service_of(database, tmp_path)
    monkeypatch.setattr("serve.owner.WAIT_S", 5.0)  # a busy server may take a moment to see it
    await second.start()
    assert await content(second, name) == await undisturbed(tmp_path / "other")
    assert [index for _, index in stages.rendered] == [1, 2]
    await second.close()


@driven
async def test_a_lost_connection_stops_the_work(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve.making._LOOK_S", 0.05)
    first, stages = service_of(postgresql, tmp_path)
    await first.start()
    video = await halfway(first, stages)
    waits = await first.create(REQUEST)
    transport = httpx.ASGITransport(build_api(first, stages.config))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client, asyncio.timeout(30):
        assert (await client.get("/healthz")).status_code == 200
        hang_up(postgresql)
        while first.counts() != {"queued": 0, "running": 0}:
            await asyncio.sleep(0.01)
        assert "is lost (OperationalError)" in first.lost
        assert f"all work is stopped: {first.lost}" in caplog.text
        answers = [
            await client.post("/v1/videos", json={"prompt": "a"}),
            await client.delete(f"/v1/videos/{video.id}"),
            await client.get("/healthz"),
        ]
        assert {(each.status_code, each.json()["error"]["code"]) for each in answers} == {(503, "unavailable")}
        assert (await client.get(f"/v1/videos/{video.id}")).json()["status"] == "in_progress"
        assert (await client.get(f"/v1/videos/{video.id}/events")).status_code == 200
    second, _ = service_of(postgresql, tmp_path)
    await second.start()  # while the first is still there
    expected = await undisturbed(tmp_path / "other")
    assert [await content(second, name) for name in (video.id, waits.id)] == [expected] * 2
    await second.close()
    await first.close()


@driven
async def test_nothing_is_accepted_that_nobody_would_make(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost, and this process has not seen it yet: who comes next has looked for work already."""
    monkeypatch.setattr("serve.making._LOOK_S", 60.0)
    first, _ = service_of(postgresql, tmp_path)
    await first.start()
    transport = httpx.ASGITransport(build_api(first, first.model.config))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        draft = (await client.post("/v1/drafts", json={"prompt": "a"})).json()["id"]
        await until(client, draft, "completed")
        await until(client, (await post(client, prompt="a"))["id"], "completed")
    hang_up(postgresql)
    second, stages = service_of(postgresql, tmp_path)
    await second.start()
    before = set((tmp_path / "videos").iterdir())
    with pytest.raises(RequestError, match="another one takes its place"):
        await first.create(REQUEST)
    assert (JobStore(postgresql).unfinished(), set((tmp_path / "videos").iterdir())) == ([], before)
    first.lost = ""
    with pytest.raises(RequestError, match="another one takes its place"):
        await first.reroll(draft, 0, RerollRequest())
    assert (await second.get(draft, kind="draft")).status == "completed"
    assert stages.planned == []
    await second.close()
    await first.close()


def test_databases_and_schemas_of_one_server_do_not_meet(server: str, postgresql: str, impatient: None) -> None:
    engines = [JobStore(server).engine, JobStore(postgresql).engine]
    run_sql(postgresql, "CREATE SCHEMA other")
    in_schema = make_url(postgresql).update_query_dict({"options": "-csearch_path=other"})
    engines.append(JobStore(in_schema.render_as_string(hide_password=False)).engine)
    with owning(engines[0]), owning(engines[1]), owning(engines[2]):
        for engine in engines:
            with pytest.raises(OwnerError), owning(engine):
                pass


def test_what_can_be_owned(tmp_path: Path, impatient: None) -> None:
    with owning(create_engine("sqlite://")), owning(create_engine("sqlite://")):  # in memory: nobody else's
        pass
    engine = JobStore.in_folder(tmp_path).engine
    owner = owner_of(engine)
    owner.take()
    owner.take()  # it has it already
    owner.check()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OwnerError), owning(JobStore.in_folder(tmp_path / "link").engine):
        pass
    owner.release()
    with pytest.raises(OwnerError, match="not made by this process any more"):
        owner.check()
    with owning(engine):
        pass


@pytest.mark.ray
def test_serve_replaces_a_replica_that_has_lost_its_connection(postgresql: str, tmp_path: Path) -> None:
    single = [f"serve.{stage}.max_replicas=1" for stage in ("ar", "dit", "decoder")]
    port, depth = f"serve.port={free_port()}", ("dit.depth=6", "dit.hidden_size=64")
    bundle = load_bundle(make_random_bundle(tmp_path / "b", *depth, port, f"serve.database_url={postgresql}", *single))
    with (
        connect(bundle.config),
        serve_bundle(bundle.config, bundle, tmp_path / "data") as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        name = client.post("/v1/videos", json={"prompt": "a", "num_segments": 12, "seed": 1}).json()["id"]

        def until(status: str) -> None:
            deadline = time.monotonic() + 90
            while True:
                with suppress(httpx.TransportError):
                    answer = client.get(f"/v1/videos/{name}")
                    if answer.status_code == 200 and answer.json()["status"] == status:
                        return
                assert time.monotonic() < deadline, answer.text
                time.sleep(0.05)

        until("in_progress")
        hang_up(postgresql)
        while client.get("/healthz").status_code != 503:
            time.sleep(0.02)
        assert client.get(f"/v1/videos/{name}").json()["status"] == "in_progress"
        until("completed")
        assert client.get("/healthz").status_code == 200
