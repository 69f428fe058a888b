"""What has been accepted is finished, whatever dies meanwhile, and comes out as if nothing had happened."""

from __future__ import annotations

import asyncio
import io
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from arlon_ray.generation.video import GrowingVideo, read_video
from serve.blobs import Blobs
from serve.job_files import JobFiles
from serve.job_store import JobStore, state_of
from serve.quotas import retry_after
from serve.schema import ExtendRequest, RequestError, VideoReference, VideoRequest
from serve.service import VideoService
from tests.serve.play import play, post, serve_alone, until
from tests.serve.stages import FakeStages, small_config, tokens_of

SEGMENTS = 5


def undisturbed(folder: Path, **body: Any) -> bytes:
    """The file that a request gives where nothing goes wrong."""
    found = []

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, (await post(client, **body))["id"], "completed", "failed")
        found.append((await client.get(f"/v1/videos/{video['id']}/content")).content)

    play(scenario, folder)
    return found[0]


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("cut", range(SEGMENTS))
def test_a_new_process_goes_on_behind_the_last_finished_segment(tmp_path: Path, cut: int, baseline: bool) -> None:
    """The process ends while segment `cut` is rendered."""
    names: list[str] = []
    prompts = [{"prompt": "one"}, {"prompt": "two"}]
    request = {"segments": prompts, "num_segments": SEGMENTS, "seed": 3, "baseline": baseline}

    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        reached = stages.hang_at(cut)
        names.append((await post(client, **request))["id"])
        names.append((await post(client, prompt="waits"))["id"])
        await reached.wait()
        while cut and (await client.get(f"/v1/videos/{names[0]}")).json()["segments"][cut - 1]["status"] != "completed":
            await asyncio.sleep(0.01)

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        assert (await client.get("/healthz")).json()["running"] == 1
        video = await until(client, names[0], "completed", "failed")
        assert video["status"] == "completed", video["error"]
        await until(client, names[1], "completed")
        assert [index for name, index in stages.rendered if name == names[0]] == list(range(cut, SEGMENTS))
        if not baseline:
            assert [index for name, index in stages.planned if name == names[0]] == list(range(cut, SEGMENTS))
        made = (await client.get(f"/v1/videos/{names[0]}/content")).content
        assert made == undisturbed_file
        assert (await client.get("/v1/videos", params={"order": "asc"})).json()["first_id"] == names[0]
        events = (await client.get(f"/v1/videos/{names[0]}/events")).text
        completed = [line for line in events.splitlines() if line == "event: segment.completed"]
        assert len(completed) == SEGMENTS  # none twice, though two processes told them
        assert events.count("event: completed") == 1

    undisturbed_file = asyncio.run(asyncio.to_thread(undisturbed, tmp_path / "other", **request))
    play(before, tmp_path)
    play(after, tmp_path)


def test_what_a_restart_can_do_without_is_written_with_the_next_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planned, rendered, decoded: every one of them is an event, and none a transaction of its own."""
    monkeypatch.setattr("serve.active._TOGETHER_S", 60.0)
    written: list[tuple[str, ...]] = []
    save = JobStore.save

    def counted(store: JobStore, state: Any, new: Any, *others: Any) -> None:
        written.append(tuple(event.type for event in new))
        save(store, state, new, *others)

    monkeypatch.setattr(JobStore, "save", counted)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, (await post(client, prompt="a", num_segments=SEGMENTS))["id"], "completed")
        assert len(written) <= 1 + SEGMENTS + 1  # its beginning, its segments, its end
        events = [event for each in written for event in each]
        kinds = ("segment.planned", "segment.rendered", "segment.completed")
        assert all(events.count(kind) == SEGMENTS for kind in kinds)
        told = (await client.get(f"/v1/videos/{video['id']}/events")).text
        assert [line for line in told.splitlines() if line.startswith("event: ")] == [f"event: {one}" for one in events]

    play(scenario, tmp_path)


@pytest.mark.parametrize("stage", ["plan", "render", "decode"])
def test_a_lost_replica_costs_a_call_and_no_video(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.orchestrator._PAUSE_S", 0.01)
    request = {"prompt": "a", "num_segments": 3, "seed": 1}

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.losses = [stage] * 3
        video = await until(client, (await post(client, **request))["id"], "completed", "failed")
        assert (video["status"], stages.losses) == ("completed", [])
        assert (await client.get(f"/v1/videos/{video['id']}/content")).content == expected
        stages.losses = [stage] * 100  # whatever is tried, it is lost
        failed = await until(client, (await post(client, **request))["id"], "completed", "failed")
        name = {"plan": "planning", "render": "rendering", "decode": "decoding"}[stage]
        assert failed["error"]["message"] == f"segment 0: {name} failed (WorkerLost)"

    expected = undisturbed(tmp_path / "other", **request)
    play(scenario, tmp_path)


def test_a_replica_lost_behind_some_segments_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.orchestrator._PAUSE_S", 0.01)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        plain = stages.lose
        calls = []

        def lose(name: str) -> None:
            calls.append(name)
            if calls.count("plan") == 3 and name == "plan":
                stages.losses = ["plan"]
            plain(name)

        stages.lose = lose  # type: ignore[method-assign]
        await until(client, (await post(client, prompt="a", num_segments=6, seed=0))["id"], "completed")
        assert [index for _, index in stages.planned] == [0, 1, 2, 3, 4, 5]
        assert [int(tokens[0, 0, 0]) for tokens in stages.tokens if tokens is not None] == [0, 1, 2, 3, 4, 5]

    play(scenario, tmp_path)


def test_another_model_begins_again_and_goes_on_from_nothing_of_the_first(tmp_path: Path) -> None:
    names: dict[str, str] = {}

    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        draft = (await client.post("/v1/drafts", json={"prompt": "a", "num_segments": 3})).json()["id"]
        await until(client, draft, "completed")
        names["draft"], names["done"] = draft, (await post(client, prompt="a"))["id"]
        await until(client, names["done"], "completed")
        stages.hang_at(2)
        names["cut"] = (await post(client, prompt="a", num_segments=3, seed=1))["id"]
        names["of_draft"] = (await post(client, draft=draft))["id"]
        while (await client.get(f"/v1/videos/{names['cut']}")).json()["segments"][1]["status"] != "completed":
            await asyncio.sleep(0.01)

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        await until(client, names["cut"], "completed")
        assert [index for name, index in stages.rendered if name == names["cut"]] == [0, 1, 2]
        failed = await until(client, names["of_draft"], "failed", "completed")
        assert failed["error"]["code"] == "model_changed"
        refused = [
            await client.post("/v1/videos", json={"draft": names["draft"]}),
            await client.post(f"/v1/drafts/{names['draft']}/segments/0/reroll", json={}),
            await client.post("/v1/videos/extensions", json={"prompt": "a", "video": {"id": names["done"]}}),
        ]
        assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(409, "model_changed")}
        # what can be seen can still be seen, and a remix needs only the request
        assert (await client.get(f"/v1/videos/{names['done']}/content")).status_code == 200
        assert (await client.post(f"/v1/videos/{names['done']}/remix", json={"prompt": "b"})).status_code == 200

    play(before, tmp_path, bundle="one")
    play(after, tmp_path, bundle="two")


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_a_damaged_segment_is_made_again(tmp_path: Path, damage: str) -> None:
    names: list[str] = []

    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.hang_at(3)
        names.append((await post(client, prompt="a", num_segments=4, seed=1))["id"])
        while (await client.get(f"/v1/videos/{names[0]}")).json()["segments"][2]["status"] != "completed":
            await asyncio.sleep(0.01)

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        await until(client, names[0], "completed")
        assert [index for _, index in stages.rendered] == [1, 2, 3]

    play(before, tmp_path)
    damaged = tmp_path / "videos" / names[0] / "segment-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-30] ^= 1
    damaged.write_bytes(data[:-20] if damage == "cut" else data)
    play(after, tmp_path)


def test_a_database_that_is_away_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, away = JobStore.save, [True]

    def save(store: JobStore, *arguments: Any) -> None:
        if away[0]:
            raise OperationalError("UPDATE", {}, Exception("no connection to /secret"))
        plain(store, *arguments)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        monkeypatch.setattr(JobStore, "save", save)
        video = await post(client, prompt="a", num_segments=3, seed=1)
        while len(stages.rendered) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        away[0] = False
        await until(client, video["id"], "completed")
        events = (await client.get(f"/v1/videos/{video['id']}/events")).text
        assert events.count("event: segment.completed") == 3
        assert (await client.get(f"/v1/videos/{video['id']}/content")).content == expected

    expected = undisturbed(tmp_path / "other", prompt="a", num_segments=3, seed=1)
    play(scenario, tmp_path)


def test_without_a_database_clients_are_told_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        def away(*_: object, **__: object) -> None:
            raise OperationalError("SELECT", {}, Exception("no connection to /secret"))

        for name in ("add", "get", "page"):
            monkeypatch.setattr(JobStore, name, away)
        answers = [
            await client.post("/v1/videos", json={"prompt": "a"}),
            await client.get("/v1/videos/video_0"),
            await client.get("/v1/videos"),
        ]
        assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "5")}
        assert all("secret" not in answer.text for answer in answers)
        assert (await client.get("/healthz")).json()["queued"] == 0

    play(scenario, tmp_path)


def test_storage_that_is_away_for_a_while_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.orchestrator._PAUSE_S", 0.01)
    plain, failures = JobFiles.write_segment, [3]

    def write(files: JobFiles, *arguments: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError("connection reset")
        plain(files, *arguments)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        monkeypatch.setattr(JobFiles, "write_segment", write)
        video = await until(
            client, (await post(client, prompt="a", num_segments=3, seed=1))["id"], "completed", "failed"
        )
        assert (await client.get(f"/v1/videos/{video['id']}/content")).content == expected

    expected = undisturbed(tmp_path / "other", prompt="a", num_segments=3, seed=1)
    play(scenario, tmp_path)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        def full(*_: object) -> None:
            raise OSError(28, os.strerror(28), "/secret")

        monkeypatch.setattr("serve.job_files.JobFiles.write_segment", full)
        video = await until(client, (await post(client, prompt="a"))["id"], "completed", "failed")
        assert video["error"] == {"code": "storage_full", "message": "segment 0: storage failed (OSError)"}

    play(scenario, tmp_path)


@pytest.mark.parametrize("at", ["segment", "file", "end"])
@pytest.mark.parametrize("kind", ["videos", "drafts"])
def test_what_was_finished_before_the_disk_was_full_is_kept(
    tmp_path: Path, kind: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, kept = {
        "segment": ("job_files.JobFiles.write_segment", 2),
        "file": ("job_files.GrowingVideo.add", 2),
        "end": ("job_files.GrowingVideo.finish", 3),
    }[at]
    owner: Any = JobFiles if at == "segment" else GrowingVideo
    plain, calls = getattr(owner, call.rsplit(".", 1)[1]), []

    def filling(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        finished = [each for each in calls if at != "segment" or each[1].finished]
        if at == "end" or len(finished) > 2:
            raise OSError(28, os.strerror(28), "/secret")
        return plain(self, *arguments)

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        monkeypatch.setattr(f"serve.{call}", filling)
        asked = (await client.post(f"/v1/{kind}", json=request)).json()
        where = f"/v1/{kind}/{asked['id']}"
        while_made = (await client.get(f"{where}/stream")).content
        failed = await until(client, asked["id"], "completed", "failed")
        monkeypatch.undo()
        error = {"code": "storage_full", "message": f"segment 2: storage failed (OSError); {told}: GET {where}/stream"}
        assert failed["error"] == error
        refused = await client.get(f"{where}/content")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, f"{kind[:-1]}_failed")
        assert f"{where}/stream" in refused.json()["error"]["message"]
        seen = await client.get(f"{where}/stream")
        assert seen.status_code == 200 and seen.content.startswith(while_made)
        assert np.array_equal(read_video(io.BytesIO(seen.content)), expected[: 34 + 17 * (kept - 1)])
        there = {path.name for path in (tmp_path / "videos" / asked["id"]).iterdir()}
        assert there >= {f"segment-{index:05d}.safetensors" for index in range(kept)}
        assert not {name for name in there if name.endswith(".mp4")}  # all of them are in these
        usage = (await client.get("/v1/usage")).json()["stored_bytes"]["used"]
        assert usage == sum(path.stat().st_size for path in (tmp_path / "videos" / asked["id"]).iterdir())
        await client.delete(where)
        assert (await client.get(f"{where}/stream")).status_code == 404

    async def undisturbed_one(client: httpx.AsyncClient, stages: FakeStages) -> None:
        name = (await client.post(f"/v1/{kind}", json=request)).json()["id"]
        await until(client, name, "completed")
        expected.extend(read_video(io.BytesIO((await client.get(f"/v1/{kind}/{name}/content")).content)))

    request = {"prompt": "a", "num_segments": 3, "seed": 1}
    told = f"{kept} of 3 segments are kept"
    expected: list[Any] = []
    play(undisturbed_one, tmp_path / "other")
    play(scenario, tmp_path)


def test_an_extension_that_finds_the_disk_full_keeps_what_it_goes_on_from(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket, where the file that grows is one of this machine."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    async def run() -> None:
        config = small_config()
        blobs, store = Blobs(bucket.replace("PLACE", "full")), JobStore.in_folder(tmp_path / "database")
        service = VideoService(config, store, FakeStages(config), blobs)
        await service.start()

        async def ended(name: str, status: str) -> None:
            async with asyncio.timeout(30):
                while (video := await service.get(name)).status not in ("completed", "failed"):
                    await asyncio.sleep(0.01)
            assert video.status == status

        short = await service.create(VideoRequest(prompt="a", num_segments=2))
        await ended(short.id, "completed")
        monkeypatch.setattr(JobFiles, "write_segment", full)
        asked = ExtendRequest(prompt="a", num_segments=1, video=VideoReference(id=short.id))
        longer = await service.extend(asked)
        await ended(longer.id, "failed")
        while longer.id in service._running:
            await asyncio.sleep(0.01)
        seen = b"".join([piece async for piece in await service.stream(longer.id)])
        with (await service.content(short.id)).file as file:
            assert np.array_equal(read_video(io.BytesIO(seen)), read_video(file))
        assert not any((tmp_path / "arlon-ray").iterdir())
        await service.close()

    asyncio.run(run())


def test_a_video_that_goes_on_is_what_a_longer_one_would_have_been(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        short = await until(client, (await post(client, prompt="a", num_segments=2, seed=5))["id"], "completed")
        stages.rendered.clear()
        body = {"prompt": "a", "seconds": "1", "video": {"id": short["id"]}}
        answer = (await client.post("/v1/videos/extensions", json=body)).json()
        assert (answer["extended_from_video_id"], len(answer["segments"])) == (short["id"], 3)
        await client.delete(f"/v1/videos/{short['id']}")  # it stands on its own
        long = await until(client, answer["id"], "completed")
        assert [index for _, index in stages.rendered] == [2]
        content = (await client.get(f"/v1/videos/{long['id']}/content")).content
        assert np.array_equal(read_video(io.BytesIO(content)), read_video(io.BytesIO(expected)))
        assert float(long["seconds"]) == (34 + 2 * 17) / 16
        again = {"prompt": "b", "num_segments": 2, "video": {"id": long["id"]}}
        longer = await until(client, (await client.post("/v1/videos/extensions", json=again)).json()["id"], "completed")
        assert [segment["prompt"] for segment in longer["segments"]] == ["a", "a", "a", "b", "b"]
        assert [int(tokens[0, 0, 0]) for tokens in stages.tokens if tokens is not None][-2:] == [503, 504]
        for body, status in (
            ({"prompt": "b", "video": {"id": "video_0"}}, 404),
            ({"prompt": "b", "num_segments": 1000, "video": {"id": long["id"]}}, 400),
            ({"prompt": "b", "num_segments": 1, "seconds": 1, "video": {"id": long["id"]}}, 400),
            ({"prompt": "", "video": {"id": long["id"]}}, 400),
        ):
            assert (await client.post("/v1/videos/extensions", json=body)).status_code == status

    expected = undisturbed(tmp_path / "other", prompt="a", num_segments=3, seed=5)
    play(scenario, tmp_path)


def test_what_has_expired_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.making._CLEANING_S", 0.05)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        running = await service.create(VideoRequest(prompt="a"))
        await asyncio.sleep(0.2)
        assert (await service.get(running.id)).expires_at is None  # what is being made never expires
        stages.gate.set()
        with pytest.raises(RequestError, match="no video"):
            while await service.get(running.id):
                await asyncio.sleep(0.01)
        while (tmp_path / "videos" / running.id).exists():
            await asyncio.sleep(0.01)

    serve_alone(scenario, tmp_path, "serve.keep_hours=0.00005")
    store = JobStore.in_folder(tmp_path)
    assert store.unfinished() == [] and store.expired() == []


def test_tokens_of_stages_differ() -> None:
    """Or the tests above could not tell one plan from another."""
    assert len({int(tokens_of(index, seed)[0, 0, 0]) for index in range(5) for seed in range(5)}) == 25


def test_the_time_that_a_service_was_away_is_no_work(tmp_path: Path) -> None:
    """Or all who are refused behind an outage would be told to come back when nobody waits any more."""

    async def begin(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        await service.create(VideoRequest(prompt="a"))
        while not stages.alive:
            await asyncio.sleep(0.01)

    async def end(service: VideoService, stages: FakeStages) -> None:
        while (await service.get(begun.video.id)).status != "completed":
            await asyncio.sleep(0.01)
        assert retry_after(service.model.config.serve, service._mean_seconds) <= 10  # what a first guess says

    serve_alone(begin, tmp_path)
    with closing(JobStore.in_folder(tmp_path)) as store:
        (begun,) = store.unfinished()
        begun.video.started_at = int(time.time()) - 3600
        store.save(state_of(begun.video))
    serve_alone(end, tmp_path)
