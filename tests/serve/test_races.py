"""Things that happen at the same time, or are cut off in the middle: nothing gets stuck or comes out twice."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy.exc import OperationalError

from arlon_ray.generation.video import read_video
from serve.callers import LOCAL, Caller
from serve.job_files import JobFiles
from serve.job_store import JobStore
from serve.schema import PlanRequest, RequestError, RerollRequest, VideoRequest
from serve.service import VideoService
from tests.serve.live import serving
from tests.serve.play import play, post, serve_alone, until
from tests.serve.stages import FakeStages


async def ended(service: VideoService, name: str, kind: str = "video") -> str:
    """The status it ends with."""
    while (status := (await service.get(name, LOCAL, kind)).status) not in ("completed", "failed"):
        await asyncio.sleep(0.01)
    return status


def test_an_old_deadline_does_not_hit_a_draft_that_is_rolled_again(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        draft = await service.create(PlanRequest(prompt="a", num_segments=2, deadline_s=2.5))
        assert await ended(service, draft.id, "draft") == "completed"
        stages.gate.clear()
        blocking = await service.create(VideoRequest(prompt="a"))
        await service.reroll(draft.id, 0, RerollRequest(seed=5))
        await asyncio.sleep(2.7)  # the first deadline passes while it waits
        assert (await service.get(draft.id, LOCAL, "draft")).status == "queued"
        stages.gate.set()
        assert await ended(service, draft.id, "draft") == "completed"
        assert await ended(service, blocking.id) == "completed"

    serve_alone(scenario, tmp_path)


def test_nor_behind_a_restart(tmp_path: Path) -> None:
    names: list[str] = []

    async def before(service: VideoService, stages: FakeStages) -> None:
        draft = await service.create(PlanRequest(prompt="a", deadline_s=2.5))
        names.append(draft.id)
        assert await ended(service, draft.id, "draft") == "completed"
        stages.gate.clear()
        await service.create(VideoRequest(prompt="a"))
        await service.reroll(draft.id, 0, RerollRequest(seed=5))
        await asyncio.sleep(2.5)

    async def after(service: VideoService, stages: FakeStages) -> None:
        assert await ended(service, names[0], "draft") == "completed"

    serve_alone(before, tmp_path)
    serve_alone(after, tmp_path)


@pytest.mark.parametrize("at", ["write_picture", "add"])
def test_a_client_that_goes_away_while_it_asks_leaves_nothing_half_done(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = JobFiles if at == "write_picture" else JobStore
    plain = getattr(owner, at)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return plain(*arguments)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        monkeypatch.setattr(owner, at, slow)
        picture = np.full((16, 16, 3), 7, np.uint8)
        asking = asyncio.create_task(service.create(VideoRequest(prompt="a"), LOCAL, picture, "key"))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.wait({asking})
        monkeypatch.setattr(owner, at, plain)
        again = await service.create(VideoRequest(prompt="a"), LOCAL, picture, "key")
        assert await ended(service, again.id) == "completed"
        assert len((await service.page("video", LOCAL, None, 10, True))[0]) == 1

    serve_alone(scenario, tmp_path)


def test_a_client_that_goes_away_while_it_deletes_has_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = JobStore.delete

    def slow(*arguments: Any) -> Any:
        time.sleep(0.2)
        return plain(*arguments)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        monkeypatch.setattr(JobStore, "delete", slow)
        stages.gate.clear()
        video = await service.create(VideoRequest(prompt="a"))
        watched = await service.events(video.id, 0)
        deleting = asyncio.create_task(service.delete(video.id))
        await asyncio.sleep(0.1)
        deleting.cancel()
        assert [event.type async for event in watched if event][-1] == "deleted"
        with pytest.raises(RequestError, match="no video"):
            await service.get(video.id)
        assert service.counts() == {"queued": 0, "running": 0} and stages.cancelled == [video.id]

    serve_alone(scenario, tmp_path)


@pytest.mark.parametrize("at", ["get", "events", "change"])
def test_a_draft_that_is_deleted_while_it_is_rolled_again_is_gone(
    tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(JobStore, at)
    reached, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        """The first call is made, and does not come back until the draft is being deleted."""
        result, first = plain(*arguments), not reached.is_set()
        reached.set()
        assert not first or go_on.wait(10)
        return result

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        draft = await service.create(PlanRequest(prompt="a", num_segments=2))
        assert await ended(service, draft.id, "draft") == "completed"
        monkeypatch.setattr(JobStore, at, held)
        rolling = asyncio.create_task(service.reroll(draft.id, 0, RerollRequest(seed=5)))
        await asyncio.to_thread(reached.wait)
        deleting = asyncio.create_task(service.delete(draft.id, LOCAL, "draft"))
        await asyncio.sleep(0.2)  # long enough to delete it
        go_on.set()
        await asyncio.gather(rolling, deleting, return_exceptions=True)
        stages.previewed.clear()
        assert deleting.exception() is None
        assert service.counts() == {"queued": 0, "running": 0}
        with pytest.raises(RequestError, match="no draft"):
            await service.get(draft.id, LOCAL, "draft")
        await asyncio.sleep(0.1)
        assert stages.previewed == [] and not (tmp_path / "videos" / draft.id).exists()

    serve_alone(scenario, tmp_path)


def test_a_draft_that_has_expired_while_it_is_rolled_again_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = JobStore.events

    def expired(store: JobStore, job_id: str, after: int = 0) -> Any:
        assert store.delete(job_id, unfinished=False)  # as the cleaner does, which asks for no lock
        return plain(store, job_id, after)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        draft = await service.create(PlanRequest(prompt="a", num_segments=2))
        assert await ended(service, draft.id, "draft") == "completed"
        monkeypatch.setattr(JobStore, "events", expired)
        with pytest.raises(RequestError, match="no draft"):
            await service.reroll(draft.id, 0, RerollRequest(seed=5))
        assert service.counts() == {"queued": 0, "running": 0}
        assert (await service.usage()).segments_today.used == 2  # nor is it counted

    serve_alone(scenario, tmp_path)


def test_deleting_without_a_database_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = JobStore.delete

    def away(*_: Any) -> None:
        raise OperationalError("DELETE", {}, Exception())

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        video = await post(client, prompt="a")
        monkeypatch.setattr(JobStore, "delete", away)
        assert (await client.delete(f"/v1/videos/{video['id']}")).status_code == 503
        monkeypatch.setattr(JobStore, "delete", plain)
        stages.gate.set()
        assert (await until(client, video["id"], "completed", "failed"))["status"] == "completed"

    play(scenario, tmp_path)


def test_a_video_fails_as_it_should_where_its_files_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise OSError("the bucket is away")

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        monkeypatch.setattr(JobFiles, "forget_all", away)
        stages.fail_at = 0
        video = await service.create(VideoRequest(prompt="a"))
        assert [event.type async for event in await service.events(video.id, 0) if event][-1] == "failed"
        assert await ended(service, video.id) == "failed"

    serve_alone(scenario, tmp_path)


def test_a_commit_that_nobody_heard_of_is_not_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, broken = JobStore.save, [2]

    def save(*arguments: Any) -> None:
        plain(*arguments)
        if broken[0]:
            broken[0] -= 1
            raise OperationalError("COMMIT", {}, Exception("connection lost"))

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        monkeypatch.setattr(JobStore, "save", save)
        video = await service.create(VideoRequest(prompt="a", num_segments=3))
        assert await ended(service, video.id) == "completed"
        seen = [event.type async for event in await service.events(video.id, 0) if event]
        assert (seen.count("segment.completed"), seen.count("completed")) == (3, 1)

    serve_alone(scenario, tmp_path)


@pytest.mark.parametrize("call", ["restore", "finish", "given"])
def test_storage_that_is_away_at_the_beginning_or_the_end(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.orchestrator._PAUSE_S", 0.01)
    plain, failures = getattr(JobFiles, call), [2]

    def hiccup(*arguments: Any) -> Any:
        result = plain(*arguments) if call == "finish" else None  # done, but nobody heard of it
        if failures[0]:
            failures[0] -= 1
            raise OSError("connection reset")
        return result if call == "finish" else plain(*arguments)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        monkeypatch.setattr(JobFiles, call, hiccup)
        video = await service.create(VideoRequest(prompt="a", num_segments=2))
        assert await ended(service, video.id) == "completed"
        content = await service.content(video.id)
        assert len(read_video(content.file)) == 34 + 17

    serve_alone(scenario, tmp_path)


def test_a_finished_draft_is_streamed_too(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        asked = await client.post("/v1/drafts", json={"prompt": "a", "num_segments": 2})
        where = f"/v1/drafts/{asked.json()['id']}"
        while_made = await client.get(f"{where}/stream")
        await until(client, asked.json()["id"], "completed")
        for answer in (while_made, await client.get(f"{where}/stream")):
            assert len(read_video(io.BytesIO(answer.content))) == 34 + 17

    play(scenario, tmp_path)


def test_many_ask_for_a_picture_at_once_and_one_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, (await post(client, prompt="a"))["id"], "completed")
        where = f"/v1/videos/{video['id']}"
        thumbnail = {"variant": "thumbnail"}
        answers = await asyncio.gather(*(client.get(f"{where}/content", params=thumbnail) for _ in range(8)))
        assert {(answer.status_code, answer.content[:4]) for answer in answers} == {(200, b"\x89PNG")}
        monkeypatch.setattr("serve.pictures.draw", lambda files, variant: (time.sleep(0.3), files.write("x", b"late")))
        drawing = asyncio.create_task(client.get(f"{where}/content", params={"variant": "spritesheet"}))
        await asyncio.sleep(0.1)
        await client.delete(where)
        assert (await drawing).status_code == 404
        assert not (tmp_path / "videos" / video["id"]).exists()

    play(scenario, tmp_path)


def test_a_draft_is_rendered_by_the_rules_of_a_video(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        draft = (await client.post("/v1/drafts", json={"prompt": "a"})).json()["id"]
        await until(client, draft, "completed")
        for body, param in (
            ({"negative_prompt": "x" * 2000}, "negative_prompt"),
            ({"model": "other"}, "model"),
            ({"size": "1x1"}, "size"),
        ):
            answer = await client.post("/v1/videos", json={"draft": draft, **body})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        picture = {"input_reference": ("a.png", b"\x89PNG", "image/png")}
        refused = await client.post("/v1/videos", data={"draft": draft}, files=picture)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_reference")
        key = {"Idempotency-Key": "k"}
        first = await client.post("/v1/videos", json={"draft": draft}, headers=key)
        await until(client, first.json()["id"], "completed")
        await client.delete(f"/v1/drafts/{draft}")
        again = await client.post("/v1/videos", json={"draft": draft}, headers=key)
        assert again.json()["id"] == first.json()["id"]

    play(scenario, tmp_path)


def test_simultaneous_requests_of_one_key_do_not_slip_past_its_bound(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        asked = (service.create(VideoRequest(prompt="a"), Caller("many")) for _ in range(12))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, RequestError) for answer in answers) == 12 - 3

    serve_alone(scenario, tmp_path, "serve.max_queued_per_key=2")


def test_away_before_there_is_anything_to_see(tmp_path: Path) -> None:
    with serving(tmp_path, "serve.max_running=1") as (url, stages), httpx.Client(base_url=url, timeout=10) as client:
        stages.held_at = 0
        video = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
        with client.stream("GET", f"/v1/videos/{video}/stream", params={"stop_on_disconnect": True}) as watched:
            assert watched.status_code == 200  # at once, long before there is a segment
        deadline = time.monotonic() + 5
        while client.get(f"/v1/videos/{video}").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.get(f"/v1/videos/{video}").status_code == 404
        stages.held_at = None
