"""Server-sent events: what happens to a video, in order, to whoever asks, whenever."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.active import Active, pieces, told
from serve.job_store import Event, JobStore, State
from serve.schema import VideoRequest
from serve.service import VideoService
from serve.work import Job, Told
from tests.serve.live import serving
from tests.serve.play import play, post, serve_alone, until
from tests.serve.served import served
from tests.serve.stages import FakeStages


def test_the_events_of_a_video(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        video = await service.create(VideoRequest(prompt="a", num_segments=2, num_inference_steps=2, solver="heun"))
        seen = [event async for event in await service.events(video.id, 0) if event]
        lasting = [event for event in seen if event.number is not None]
        assert [event.number for event in lasting] == list(range(1, len(lasting) + 1))
        kinds = [event.type for event in lasting]
        assert (kinds[0], kinds[-1]) == ("in_progress", "completed")
        for kind in ("planned", "rendered", "completed"):
            assert [event.data["index"] for event in lasting if event.type == f"segment.{kind}"] == [0, 1]
        done = [event.data for event in lasting if event.type == "segment.completed"]
        assert [each["frames"] for each in done] == [34, 17]
        assert 50 <= done[0]["progress"] <= done[1]["progress"] == 99
        steps = [
            (event.data["index"], event.data["step"], event.data["steps"]) for event in seen if event.number is None
        ]
        assert steps and steps == sorted(steps) and set(steps) <= {(k, i, 3) for k in (0, 1) for i in (1, 2, 3)}
        # who comes later hears the same, and who comes back only what is new
        again = [event async for event in await service.events(video.id, 0)]
        assert again == lasting
        assert [event async for event in await service.events(video.id, 3)] == lasting[3:]

    serve_alone(scenario, tmp_path)


def test_who_waits_knows_how_long(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        first, second, third = [await service.create(VideoRequest(prompt="a")) for _ in range(3)]
        watched = await service.events(third.id, 0)
        assert await anext(watched) == Event("queue", {"position": 2})
        await service.delete(second.id)
        assert await anext(watched) == Event("queue", {"position": 1})
        stages.gate.set()
        assert [event.type async for event in watched if event and event.number][-1] == "completed"
        assert (await service.get(first.id)).status == "completed"

    serve_alone(scenario, tmp_path)


def test_a_quiet_connection_is_kept_open_and_a_deleted_video_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("serve.active._QUIET_S", 0.05)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        video = await service.create(VideoRequest(prompt="a"))
        watched = await service.events(video.id, 0)
        while await anext(watched) is not None:
            pass
        await service.delete(video.id)
        assert [event.type async for event in watched if event][-1] == "deleted"

    serve_alone(scenario, tmp_path)


def test_over_http(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.fail_at = 1
        video = await post(client, prompt="a", num_segments=2)
        await until(client, video["id"], "failed")
        answer = await client.get(f"/v1/videos/{video['id']}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        blocks = [block.splitlines() for block in answer.text.strip().split("\n\n")]
        last = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in blocks[-1]}
        assert (last["id"], last["event"]) == (str(len(blocks)), "failed")
        assert json.loads(last["data"])["code"] == "generation_failed"
        rest = await client.get(f"/v1/videos/{video['id']}/events", headers={"Last-Event-ID": str(len(blocks) - 1)})
        assert rest.text.strip().splitlines() == blocks[-1]
        bad = await client.get(f"/v1/videos/{video['id']}/events", headers={"Last-Event-ID": "x"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "Last-Event-ID")
        assert (await client.get("/v1/videos/video_0/events")).status_code == 404

    play(scenario, tmp_path)


def test_a_slow_reader_misses_no_lasting_event(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        video = await service.create(VideoRequest(prompt="a", num_segments=6))
        numbers = []
        async for event in await service.events(video.id, 0):
            if event and event.number:
                numbers.append(event.number)
            await asyncio.sleep(0.03)
        assert numbers == list(range(1, 6 * 3 + 3))

    serve_alone(scenario, tmp_path)


@pytest.mark.parametrize("what", ["stream", "events"])
def test_who_goes_away_may_take_the_video_along(tmp_path: Path, what: str) -> None:
    with serving(tmp_path) as (url, stages), httpx.Client(base_url=url, timeout=10) as client:
        stages.held_at = 1
        for asked, status in ((True, 404), (False, 200)):
            video = client.post("/v1/videos", json={"prompt": "a", "num_segments": 3}).json()["id"]
            where = f"/v1/videos/{video}/{what}"
            with client.stream("GET", where, params={"stop_on_disconnect": asked}) as watched:
                pieces = watched.iter_raw()
                next(pieces)
                with client.stream("GET", where) as other:  # who did not ask for it may come and go
                    next(other.iter_raw())
                while client.get(f"/v1/videos/{video}").json()["segments"][1]["status"] != "rendering":
                    time.sleep(0.01)
            deadline = time.monotonic() + 5
            while client.get(f"/v1/videos/{video}").status_code != status and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)
            assert client.get(f"/v1/videos/{video}").status_code == status
            assert (video in stages.cancelled) == asked
        stages.held_at = None


def test_to_the_end_is_not_away(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await post(client, prompt="a", num_segments=2)
        await client.get(f"/v1/videos/{video['id']}/stream", params={"stop_on_disconnect": True})
        assert (await until(client, video["id"], "completed", "failed"))["status"] == "completed"

    play(scenario, tmp_path)


def test_nothing_comes_behind_the_end(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        plain = stages.render

        async def render(job: Job, index: int, tokens: object, overlap: object, told: Told) -> object:
            made = await plain(job, index, tokens, overlap, told)  # type: ignore[arg-type]
            late.append(asyncio.create_task(asyncio.sleep(0.3)))
            late[-1].add_done_callback(lambda _: late.append(asyncio.create_task(told(index, 99))))  # type: ignore[arg-type]
            return made

        late: list[asyncio.Task[None]] = []
        stages.render = render  # type: ignore[method-assign, assignment]
        video = await service.create(VideoRequest(prompt="a"))
        watched = await service.events(video.id, 0)
        seen = []
        async for event in watched:
            seen.append(event)
            if event and event.type == "completed":
                await asyncio.sleep(0.5)  # a step is told meanwhile
        assert seen[-1] and seen[-1].type == "completed"

    serve_alone(scenario, tmp_path)


def test_the_end_is_told_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hears that a video is completed asks for its file at once."""
    monkeypatch.setattr("serve.active._GATHER_S", 0.01)
    written, save = threading.Event(), JobStore.save

    def slow(store: JobStore, state: State, *others: Any) -> None:
        if state["status"] == "completed":
            written.wait(10)
        save(store, state, *others)

    monkeypatch.setattr(JobStore, "save", slow)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        video = await service.create(VideoRequest(prompt="a"))
        watched = await service.events(video.id, 0)
        seen = []
        while "segment.completed" not in seen:
            event = await anext(watched)
            seen.append(event.type if event else "")
        last = asyncio.ensure_future(anext(watched))
        await asyncio.sleep(0.2)
        assert not last.done() and (await service.get(video.id)).status == "in_progress"
        written.set()
        event = await last
        assert event and event.type == "completed" and (await service.get(video.id)).status == "completed"

    try:
        serve_alone(scenario, tmp_path)
    finally:
        written.set()


async def waiting(service: VideoService, stages: FakeStages) -> Active:
    """A video that waits for another one: nobody but the test tells anything of it."""
    stages.gate.clear()
    for _ in range(2):
        video = await service.create(VideoRequest(prompt="a"))
    active = service._find(video.id)
    assert active is not None
    return active


def test_who_has_been_told_something_hears_the_rest_together_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.active._GATHER_S", 60.0)

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        active = await waiting(service, stages)
        watched = told(active, 0)
        assert (await anext(watched)) == Event("queue", {"position": 1})
        following = asyncio.ensure_future(anext(watched))
        for step in (2, 3):
            active.tell("segment.step", lasting=False, step=step)
        active.tell("segment.rendered", index=0)
        active.tell("segment.planned", index=1)
        await asyncio.sleep(0.05)
        assert not following.done()
        active.tell(ended=True)  # the end waits for nothing
        rest = [await following, *[event async for event in watched]]
        assert [event.type for event in rest if event] == ["segment.step", "segment.rendered", "segment.planned"]
        assert rest[0] == Event("segment.step", {"step": 3})

    serve_alone(scenario, tmp_path)


def test_who_comes_back_from_further_on_hears_nothing_twice(tmp_path: Path) -> None:
    """What a killed server had told and not written is numbered again."""

    async def scenario(service: VideoService, stages: FakeStages) -> None:
        active = await waiting(service, stages)
        watched = told(active, 2)
        assert (await anext(watched)) == Event("queue", {"position": 1})
        for index in range(3):
            active.tell("segment.planned", index=index)
            await asyncio.sleep(0.15)
        active.tell(ended=True)
        assert [event async for event in watched] == [Event("segment.planned", {"index": 2}, 3)]

    serve_alone(scenario, tmp_path)


class Counted(io.BytesIO):
    """A file that knows how often somebody looked for more."""

    looked = 0

    def read(self, size: int | None = -1) -> bytes:
        self.looked += 1
        return super().read(size)


def test_a_stream_looks_for_more_when_there_is_more(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        active = await waiting(service, stages)
        file, got = Counted(b"1"), list[bytes]()

        async def read() -> None:
            async for piece in pieces(file, active):
                got.append(piece)

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        looked = file.looked
        for step in range(5):
            active.tell("segment.step", lasting=False, step=step)
        await asyncio.sleep(0.1)
        assert (got, file.looked) == ([b"1"], looked)
        for what in (active.started(0), active.segment(0, "completed")):  # after a restart the file is there already
            at = file.tell()
            file.write(b"2")
            file.seek(at)
            await what
            await asyncio.sleep(0.1)
        assert got == [b"1", b"2", b"2"]
        active.tell(ended=True)
        await asyncio.wait_for(reading, 5)

    serve_alone(scenario, tmp_path)


def test_one_key_does_not_hold_all_connections(tmp_path: Path) -> None:
    """Events last as long as their video, here for ever; a connection that is closed holds nothing."""
    with served(tmp_path, "serve.max_open_per_key=3", hold=True) as it, it.client() as client:
        made = client.post("/v1/videos", json={"prompt": "a"}).json()["id"]
        head = f"GET /v1/videos/{made}/events HTTP/1.1\r\nHost: h\r\nAuthorization: {it.user['authorization']}\r\n\r\n"
        watching = [socket.create_connection(("127.0.0.1", it.port)) for _ in range(3)]
        for each in watching:
            each.sendall(head.encode())
            assert b" 200 " in each.recv(64)
        refused = client.get(f"/v1/videos/{made}")
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "too_many_open"
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{it.url}/v1/videos", headers=it.admin).status_code == 200  # another key
        assert httpx.get(f"{it.url}/healthz").status_code == 200
        watching.pop().close()
        until = time.monotonic() + 10
        while (status := client.get(f"/v1/videos/{made}").status_code) == 429 and time.monotonic() < until:
            time.sleep(0.02)
        assert status == 200
        watching.append(socket.create_connection(("127.0.0.1", it.port)))
        watching[-1].sendall(head.encode())
        assert b" 200 " in watching[-1].recv(64)
        assert client.get(f"/v1/videos/{made}").status_code == 429
        assert client.delete(f"/v1/videos/{made}").status_code == 200  # what ends work is let through
        for each in watching:
            each.close()
