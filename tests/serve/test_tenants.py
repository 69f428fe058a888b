"""Tenants: what their keys share, their turns, quotas and places; and databases of an earlier version."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, inspect, text

from arlon_ray.bundle import load_bundle
from arlon_ray.config import ConfigError, TenantConfig, load_config
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.api import build_api
from serve.app import serve_bundle
from serve.blobs import Blobs
from serve.callers import LOCAL, Caller
from serve.cleaning import MARK, Cleaner
from serve.fair_queue import FairQueue
from serve.job_store import DayUsedError, JobStore
from serve.keys import KeyCheck, KeyNameError, Keys, Known
from serve.metrics import MemoryRecorder, Metrics
from serve.places import Places
from serve.schema import ExtendRequest, PlanRequest, RequestError, RerollRequest, VideoReference, VideoRequest
from serve.service import VideoService
from tests.bundles import make_random_bundle
from tests.postgres import postgres
from tests.serve.play import serve_alone
from tests.serve.stages import FakeStages, small_config
from tests.serve.test_job_store import stored

ANN, BEN, EVE = Caller("ann", tenant="studio"), Caller("ben", tenant="studio"), Caller("eve")


@dataclass(frozen=True)
class Waiting:
    id: str
    tenant: str
    segments: int = 1


def turns(queue: FairQueue[Waiting], running: list[Waiting], count: int) -> str:
    """The tenants of the next turns, where each video ends before the next turn."""
    names = ""
    for _ in range(count):
        first = queue.pop(running)
        names += first.tenant if first else "-"
    return names


def filled(*tenants: str, each: int = 12, **settings: TenantConfig) -> FairQueue[Waiting]:
    plain = TenantConfig()
    queue: FairQueue[Waiting] = FairQueue(lambda name: settings.get(name, plain))
    for number in range(each):
        for name in tenants:
            queue.add(Waiting(f"{name}{number}", name))
    return queue


def test_turns_are_shared_by_weight() -> None:
    assert turns(filled("a", "b"), [], 6) == "ababab"
    queue = filled("a", "b", a=TenantConfig(weight=3))
    assert [each.tenant for each in queue.order([])][:8] == list("abaabaaa")
    assert turns(queue, [], 8) == "abaabaaa"
    # of those under way too: a may have three for each of b
    running = [Waiting("x", "a"), Waiting("y", "a")]
    assert turns(filled("a", "b", a=TenantConfig(weight=3)), [*running, Waiting("z", "b")], 1) == "a"
    assert turns(filled("a", "b", a=TenantConfig(weight=3)), [*running, *running], 1) == "b"


def test_long_videos_are_more_than_short_ones() -> None:
    """Of four segments each: as many turns as there is work."""
    queue = filled("b")
    for number in range(3):
        queue.add(Waiting(f"a{number}", "a", segments=4))
    assert turns(queue, [], 10) == "babbbabbbb"


def test_who_was_away_has_saved_up_no_turns() -> None:
    queue = filled("a", each=20)
    assert turns(queue, [], 10) == "a" * 10
    for number in range(4):
        queue.add(Waiting(f"b{number}", "b"))
    assert turns(queue, [], 6) == "bababa"


def test_a_tenant_that_is_full_waits_and_the_others_do_not() -> None:
    queue = filled("a", "b", each=2, a=TenantConfig(max_running=1))
    running = [Waiting("x", "a"), Waiting("y", "b"), Waiting("z", "b")]
    assert [each.id for each in queue.order(running)] == ["b0", "b1", "a0", "a1"]
    assert turns(queue, running, 3) == "bb-" and len(queue) == 2
    assert turns(queue, [], 1) == "a"


def test_a_small_tenant_does_not_wait_for_anothers_flood(tmp_path: Path) -> None:
    """Two keys of a tenant are no two turns."""

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        flood = [(await service.create(VideoRequest(prompt="a"), who)).id for _ in range(4) for who in (ANN, BEN)]
        few = [(await service.create(VideoRequest(prompt="a"), EVE)).id for _ in range(2)]
        stages.gate.set()
        while service.counts() != {"queued": 0, "running": 0}:
            await asyncio.sleep(0.01)
        order = [name for name, _ in stages.rendered]
        assert [order.index(name) for name in few] == [1, 3] and len(order) == len(flood) + len(few)

    serve_alone(scenario, tmp_path)


def test_keys_of_one_tenant_share_their_videos_and_nobody_else_sees_them(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        keys = Keys(create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}"))
        made = {name: keys.add(name, tenant=tenant) for name, tenant in (("ann", "studio"), ("ben", "studio"))}
        made["eve"] = keys.add("eve")
        with pytest.raises(KeyNameError, match="studio is a tenant's name: name the tenant studio too"):
            keys.add("studio")
        with pytest.raises(KeyNameError, match="ann is of the tenant studio: a name has one tenant"):
            keys.add("ann", another=True)
        with pytest.raises(KeyNameError, match=r"tenant '\.\./x': expected up to 64"):
            keys.add("ann", tenant="../x", another=True)
        assert keys.find(made["ann"]) == Known(ANN) and keys.find(made["eve"]) == Known(EVE)
        assert [key.tenant for key in keys.list()] == ["studio", "studio", ""]

        config = small_config("serve.auth=on")
        transport = httpx.ASGITransport(build_api(service, config, KeyCheck(keys)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def ask(name: str, method: str, path: str, **options: Any) -> httpx.Response:
                return await client.request(method, path, headers={"authorization": f"Bearer {made[name]}"}, **options)

            kinds = {"videos": "", "drafts": ""}
            for kind in kinds:
                kinds[kind] = (await ask("ann", "POST", f"/v1/{kind}", json={"prompt": "a"})).json()["id"]
            for kind, name in kinds.items():
                assert (await ask("ben", "GET", f"/v1/{kind}/{name}")).json()["id"] == name
                assert [each["id"] for each in (await ask("ben", "GET", f"/v1/{kind}")).json()["data"]] == [name]
                assert (await ask("eve", "GET", f"/v1/{kind}")).json()["data"] == []
                for method, path in (("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", "")):
                    answer = await ask("eve", method, f"/v1/{kind}/{name}{path}")
                    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            usage = (await ask("ben", "GET", "/v1/usage")).json()
            assert (usage["tenant"], usage["segments_today"]) == ("studio", {"used": 2, "most": None})
            assert (await ask("eve", "GET", "/v1/usage")).json()["segments_today"]["used"] == 0
            assert (await ask("ben", "DELETE", f"/v1/videos/{kinds['videos']}")).status_code == 200

    serve_alone(scenario, tmp_path)


def test_quotas_are_refused_by_name(tmp_path: Path) -> None:
    async def refused(service: VideoService, who: Caller, status: int, code: str, says: str, **body: Any) -> None:
        with pytest.raises(RequestError, match=says) as error:
            await service.create(VideoRequest(prompt="a", **body), who)
        assert (error.value.status, error.value.code) == (status, code)
        assert (error.value.retry_after_s is not None) == (status == 429)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        service.metrics = service._quotas._metrics = Metrics(recorder := MemoryRecorder())
        stages.gate.clear()
        for _ in range(2):  # one is made, one waits
            await service.create(VideoRequest(prompt="a"), ANN)
        usage = await service.usage(BEN)
        assert (usage.running.used, usage.running.most) == (1, 1) and (usage.queued.used, usage.queued.most) == (1, 1)
        await refused(service, BEN, 429, "too_many_queued", r"studio are waiting already \(max_queued 1\)")
        await service.create(VideoRequest(prompt="a"), EVE)
        assert service.counts() == {"queued": 1, "running": 2}  # there is room, but not for the studio
        assert recorder.gauges["tenant_queue_length", "studio"] == 1
        assert recorder.gauges["tenant_running", "other"] == 1
        stages.gate.set()
        while service.counts() != {"queued": 0, "running": 0}:
            await asyncio.sleep(0.01)

        await refused(service, ANN, 429, "daily_quota_exceeded", r"5 of studio for a day \(segm", num_segments=4)
        await refused(service, ANN, 403, "daily_quota_exceeded", r"6 segments more are over the 5", num_segments=6)
        asked = VideoRequest(prompt="a", num_segments=2)
        made = [await service.create(asked, ANN, idempotency_key="k") for _ in range(3)]  # twice for nothing
        assert len({video.id for video in made}) == 1
        assert (await service.usage(ANN)).segments_today.used == 4
        while (await service.get(made[0].id, ANN)).status != "completed":
            await asyncio.sleep(0.01)
        more = ExtendRequest(prompt="b", video=VideoReference(id=made[0].id), num_segments=2)
        with pytest.raises(RequestError, match="2 segments more are over the 5"):
            await service.extend(more, BEN)

        used = await service.usage(EVE)
        assert used.stored_bytes.used > 900 and used.stored_bytes.most == 900
        await refused(service, EVE, 403, "storage_quota_exceeded", r"at most 900 \(max_stored_bytes\): delete some")
        await service.delete((await service.page("video", EVE, None, 1, True))[0][0].id, EVE)
        await service.create(VideoRequest(prompt="a"), EVE)
        assert recorder.counters["tenant_refused", "studio", "daily_quota_exceeded"] == 3
        assert recorder.counters["tenant_refused", "other", "storage_quota_exceeded"] == 1

    studio = ["max_running=1", "max_queued=1", "segments_per_day=5"]
    settings = [f"serve.tenants.studio.{each}" for each in studio]
    serve_alone(scenario, tmp_path, "serve.max_running=8", *settings, "serve.tenant_default.max_stored_bytes=900")


def test_a_plan_that_is_made_anew_counts_too(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        draft = await service.create(PlanRequest(prompt="a", num_segments=3), ANN)
        while (await service.get(draft.id, ANN, "draft")).status != "completed":
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="2 segments more are over the 4"):
            await service.reroll(draft.id, 1, RerollRequest(), BEN)
        await service.reroll(draft.id, 2, RerollRequest(), BEN)
        assert (await service.usage(ANN)).segments_today.used == 4

    serve_alone(scenario, tmp_path, "serve.tenants.studio.segments_per_day=4")


def test_a_tenants_files_lie_in_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "elsewhere"
    callers = {"video_of_eve": EVE, "ann": ANN, "zoe": Caller("zoe", tenant="labs")}
    made: dict[str, str] = {}

    async def first(service: VideoService, stages: FakeStages) -> None:
        for name, who in callers.items():
            made[name] = (await service.create(VideoRequest(prompt="a"), who)).id
            while (await service.get(made[name], who)).status != "completed":
                await asyncio.sleep(0.01)
            found = Path((await service.content(made[name], who)).file.name)
            places = {"ann": tmp_path / "tenants" / "studio", "zoe": own}
            assert found == places.get(name, tmp_path) / "videos" / made[name] / "video.mp4"
            assert found.is_file()

    async def second(service: VideoService, stages: FakeStages) -> None:
        for name, who in callers.items():
            found = Path((await service.content(made[name], who)).file.name)
            longer = ExtendRequest(prompt="b", video=VideoReference(id=made[name]))
            longer_id = (await service.extend(longer, who)).id
            while (await service.get(longer_id, who)).status != "completed":
                await asyncio.sleep(0.01)
            await service.delete(made[name], who)
            assert not found.parent.exists()

    settings = f"serve.tenants.labs.data_dir={own}"
    serve_alone(first, tmp_path, settings)
    serve_alone(second, tmp_path, settings)

    monkeypatch.setattr("serve.cleaning.GRACE_S", -5.0)
    places = Places(Blobs(tmp_path), {"labs": TenantConfig(data_dir=str(own))})
    cleaner = Cleaner(JobStore.in_folder(tmp_path), places)
    for number, blobs in enumerate(places.all()):
        blobs.write(f"videos/video_lost{number}/a", b"x")
        assert blobs.exists(MARK)
    assert len(places.all()) == 3 and cleaner.orphans() == [f"video_lost{number}" for number in range(3)]


def test_what_cannot_be_a_tenants_configuration() -> None:
    for setting, says in (
        ("tenants.a/b.weight=2", "should match pattern"),
        ("tenants.a.wieght=2", "unknown key serve.tenants.a.wieght"),
        ("tenants.a.weight=0", "greater than 0"),
        ("tenants.a.data_dir=runs/x", "runs/x: expected an absolute folder or an address"),
        ("tenant_default.data_dir=/x", "a place belongs to one tenant"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_config("tiny", [f"serve.{setting}"])
    serve = load_config("tiny", ["serve.tenants.a.weight=2", "serve.tenant_default.max_running=3"]).serve
    assert (serve.tenant("a").weight, serve.tenant("a").max_running, serve.tenant("b").max_running) == (2, None, 3)


def test_two_requests_do_not_share_what_is_left_of_a_day(tmp_path: Path) -> None:
    store = JobStore.in_folder(tmp_path)

    async def ask(name: str) -> bool:
        try:
            await asyncio.to_thread(store.add, stored(name, owner="studio"), 3, 10)
        except DayUsedError:
            return False
        return True

    async def all_at_once() -> list[bool]:
        return await asyncio.gather(*(ask(f"video_{number}") for number in range(8)))

    assert sum(asyncio.run(all_at_once())) == 3
    assert store.used("studio")[0] == 9 and len(store.page("video", LOCAL)[0]) == 3


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_of_an_earlier_version_opens_without_loss(kind: str, tmp_path: Path) -> None:
    if kind == "sqlite":
        check_migration(f"sqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path)
        return
    with postgres(tmp_path / "server") as url:
        check_migration(url, tmp_path)


def check_migration(url: str, folder: Path) -> None:
    """Take away what the earlier version did not have, and open it."""
    store = JobStore(url)
    engine = store.engine
    key = Keys(engine).add("me")
    for name, status in (("video_done", "completed"), ("video_next", "queued")):
        store.add(stored(name, status, idempotency_key=name))  # type: ignore[arg-type]
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE usage"))
        connection.execute(text("ALTER TABLE jobs DROP COLUMN stored_bytes"))
        connection.execute(text("ALTER TABLE keys DROP COLUMN tenant"))
        (job,) = connection.execute(text("SELECT job FROM jobs WHERE id = 'video_done'")).one()
        old = json.loads(job) if isinstance(job, str) else dict(job)
        del old["tenant"]
        connection.execute(text("UPDATE jobs SET job = :job WHERE id = 'video_done'"), {"job": json.dumps(old)})
    old_columns = {column["name"] for column in inspect(engine).get_columns("jobs")}
    store.close()

    again = JobStore(url)
    assert {column["name"] for column in inspect(again.engine).get_columns("jobs")} == old_columns | {"stored_bytes"}
    assert Keys(again.engine).find(key) == Known(Caller("me"))
    assert [video.id for video in again.page("video", Caller("me"))[0]] == ["video_next", "video_done"]
    found = again.find("me", "video_done")
    assert found and found.job.tenant == "" and found.video.status == "completed"
    assert len(again.unfinished()) == 1 and again.used("me") == (0, 0)
    assert again.add(stored("video_new", idempotency_key="video_next")) is not None  # it knows the keys
    Blobs(folder).write("videos/video_done/video.mp4", b"12345")
    Cleaner(again, Places(Blobs(folder))).clean()
    assert again.used("me") == (0, 5)  # measured behind what had been made before
    again.close()
    JobStore(url).close()


@pytest.mark.ray
@pytest.mark.slow
def test_a_flood_through_ray_keeps_another_tenant_waiting_for_one_video(tmp_path: Path) -> None:
    """One video at a time; the flood was there first, of two keys of one tenant."""
    each = [
        f"serve.{stage}.{setting}"
        for stage in ("ar", "dit", "decoder")
        for setting in ("max_replicas=1", "num_cpus=0.1")
    ]
    port = f"serve.port={free_port()}"
    bundle = load_bundle(make_random_bundle(tmp_path / "b", port, "serve.auth=on", "serve.max_running=1", *each))
    data = tmp_path / "data"
    keys = Keys(JobStore.in_folder(data).engine)
    ann, ben, eve = (
        {"authorization": f"Bearer {keys.add(name, tenant=tenant)}"}
        for name, tenant in (("ann", "flood"), ("ben", "flood"), ("eve", ""))
    )
    with connect(bundle.config), serve_bundle(bundle.config, bundle, data) as url, httpx.Client(base_url=url) as client:

        def ask(who: dict[str, str]) -> str:
            answer = client.post("/v1/videos", json={"prompt": "a", "num_segments": 4}, headers=who)
            assert answer.status_code == 200, answer.text
            return answer.json()["id"]

        def ended(name: str, who: dict[str, str]) -> dict[str, Any]:
            client.get(f"/v1/videos/{name}/events", headers=who, timeout=600)
            return client.get(f"/v1/videos/{name}", headers=who).json()

        ended(ask(ann), ann)  # what is compiled and loaded by the first is
        flood = [ask(who) for _ in range(5) for who in (ann, ben)]
        few = ended(ask(eve), eve)
        made = [ended(name, ann) for name in flood]
    assert {video["status"] for video in (few, *made)} == {"completed"}
    # times of the service are whole seconds
    one_video_s = max(video["completed_at"] - video["started_at"] for video in made) + 1
    waited_s = few["started_at"] - few["created_at"]
    before = sum(video["started_at"] < few["started_at"] for video in made)
    print(f"waited {waited_s} s behind {before} of {len(made)}; a video takes up to {one_video_s} s")
    under_way = sum(video["started_at"] <= few["created_at"] for video in made)
    assert before <= under_way + 1 and waited_s <= 2 * one_video_s
    assert max(video["completed_at"] for video in made) - few["completed_at"] > waited_s
