"""Turns, limits, deadlines, owners, and requests that are made twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from serve.callers import Caller
from serve.schema import RequestError, VideoRequest
from serve.service import VideoService
from tests.serve.play import play, serve_alone, until
from tests.serve.stages import FakeStages

MANY, FEW = Caller("many"), Caller("few")


def test_one_owners_flood_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        flood = [(await service.create(VideoRequest(prompt="a"), MANY)).id for _ in range(5)]
        few = [(await service.create(VideoRequest(prompt="a"), FEW)).id for _ in range(2)]
        positions = [await anext(await service.events(name, 0, FEW)) for name in few]
        assert [event.data["position"] for event in positions if event] == [1, 3]
        stages.gate.set()
        while service.counts() != {"queued": 0, "running": 0}:
            await asyncio.sleep(0.01)
        order = [name for name, _ in stages.rendered]
        assert order == [flood[0], few[0], flood[1], few[1], *flood[2:]]

    serve_alone(scenario, tmp_path)


def test_each_key_has_a_bound_of_its_own(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        for _ in range(3):
            await service.create(VideoRequest(prompt="a"), MANY)
        with pytest.raises(RequestError, match=r"2 videos of many are .* \(max_queued_per_key 2\)") as refused:
            await service.create(VideoRequest(prompt="a"), MANY)
        assert (refused.value.status, refused.value.code) == (429, "too_many_queued")
        assert refused.value.retry_after_s
        await service.create(VideoRequest(prompt="a"), FEW)

    serve_alone(scenario, tmp_path, "serve.max_queued_per_key=2")


def test_owners_see_their_own_videos_and_admins_all(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        video = await service.create(VideoRequest(prompt="a"), MANY)
        calls = (
            lambda who: service.get(video.id, who),
            lambda who: service.content(video.id, who),
            lambda who: service.stream(video.id, who),
            lambda who: service.events(video.id, 0, who),
            lambda who: service.page("video", who, video.id, 1, True),
            lambda who: service.delete(video.id, who),
        )
        for call in calls:
            with pytest.raises(RequestError, match="no video") as refused:
                await call(FEW)
            assert refused.value.code == "not_found"
        assert (await service.page("video", FEW, None, 10, True))[0] == []
        assert (await service.get(video.id, MANY)).id == video.id
        assert (await service.get(video.id, Caller("boss", "admin"))).id == video.id

    serve_alone(scenario, tmp_path)


def test_deadlines(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.gate.clear()
        running = await service.create(VideoRequest(prompt="a", deadline_s=0.3))
        waiting = await service.create(VideoRequest(prompt="a", deadline_s=0.1))
        patient = await service.create(VideoRequest(prompt="a", deadline_s=1000))
        while (await service.get(running.id)).status != "failed":
            await asyncio.sleep(0.01)
        for name in (running.id, waiting.id):
            video = await service.get(name)
            assert video.error and video.error.code == "deadline_exceeded"
        assert stages.cancelled == [running.id]  # and the work is stopped
        stages.gate.set()
        while (await service.get(patient.id)).status != "completed":
            await asyncio.sleep(0.01)

    serve_alone(scenario, tmp_path)


def test_a_request_made_twice_is_one_video(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        async def ask(key: str, **body: object) -> httpx.Response:
            return await client.post("/v1/videos", json=body, headers={"Idempotency-Key": key})

        answers = await asyncio.gather(*(ask("k", prompt="a", seed=1) for _ in range(6)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert (await ask("k", prompt="a", seed=1)).json()["id"] == answers[0].json()["id"]
        other = await ask("k", prompt="b", seed=1)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert (await ask("k2", prompt="a", seed=1)).json()["id"] != answers[0].json()["id"]
        assert len((await client.get("/v1/videos")).json()["data"]) == 2
        assert (await ask("", prompt="a")).status_code == 400

    play(scenario, tmp_path, "serve.max_running=2")


def test_what_goes_on_from_something_is_made_once_too(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        async def ask(path: str, key: str, **body: object) -> httpx.Response:
            return await client.post(f"/v1/{path}", json=body, headers={"Idempotency-Key": key})

        def conflict(answer: httpx.Response) -> bool:
            return (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")

        sources = [(await ask("videos", name, prompt="a")).json()["id"] for name in ("source", "other")]
        for source in sources:
            await until(client, source, "completed")
        remix, extend = f"videos/{sources[0]}/remix", "videos/extensions"
        bodies = {remix: {"prompt": "b"}, extend: {"prompt": "b", "video": {"id": sources[0]}}}
        for path, body in bodies.items():
            answers = await asyncio.gather(*(ask(path, path, **body) for _ in range(4)))
            (made,) = {answer.json()["id"] for answer in answers}
            await until(client, made, "completed")
            assert (await ask(path, path, **body)).json()["id"] == made
            assert conflict(await ask(path, path, **{**body, "prompt": "c"}))
        assert conflict(await ask(f"videos/{sources[1]}/remix", remix, prompt="b"))
        assert conflict(await ask(extend, extend, prompt="b", video={"id": sources[1]}))
        for path, key in (("videos", remix), ("drafts", remix), (extend, remix), (remix, extend), (remix, "source")):
            assert conflict(await ask(path, key, **bodies.get(path, {"prompt": "b"}))), (path, key)
        assert len((await client.get("/v1/videos")).json()["data"]) == 4
        await client.delete(f"/v1/videos/{sources[0]}")  # what was made of it stays what it is
        assert (await ask(remix, remix, prompt="b")).json()["remixed_from_video_id"] == sources[0]

    play(scenario, tmp_path)


def test_a_segment_is_rolled_again_once_for_a_key(tmp_path: Path) -> None:
    names: list[str] = []

    async def ask(client: httpx.AsyncClient, path: str, key: str, **body: object) -> httpx.Response:
        return await client.post(f"/v1/{path}", json=body, headers={"Idempotency-Key": key})

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        draft = (await ask(client, "drafts", "made", prompt="a", num_segments=2, seed=1)).json()["id"]
        names.append(draft)
        await until(client, draft, "completed")
        reroll = f"drafts/{draft}/segments/1/reroll"
        answers = await asyncio.gather(*(ask(client, reroll, "k", following="keep") for _ in range(4)))
        (seed,) = {answer.json()["segments"][1]["seed"] for answer in answers}  # drawn once
        await until(client, draft, "completed")
        again = (await ask(client, reroll, "k", following="keep")).json()
        assert (again["status"], again["segments"][1]["seed"]) == ("completed", seed)
        assert (await client.get("/v1/usage")).json()["segments_today"]["used"] == 3
        for path, key, body in (
            (reroll, "k", {"seed": 5}),
            (f"drafts/{draft}/segments/0/reroll", "k", {}),
            ("drafts", "k", {"prompt": "a"}),
            ("videos", "k", {"draft": draft}),
            (reroll, "made", {}),
        ):
            answer = await ask(client, path, key, **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict"), (path, key)
        assert (await ask(client, "drafts", "made", prompt="a", num_segments=2, seed=1)).json()["id"] == draft
        assert (await ask(client, reroll, "k2", seed=5)).json()["segments"][1]["seed"] == 5
        await until(client, draft, "completed")

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        reroll = f"drafts/{names[0]}/segments/1/reroll"
        assert (await ask(client, reroll, "k", following="keep")).json()["segments"][1]["seed"] == 5
        await client.delete(f"/v1/drafts/{names[0]}")
        assert (await ask(client, reroll, "k", following="keep")).status_code == 404
        assert (await ask(client, "drafts", "k", prompt="a")).status_code == 200  # forgotten with it

    play(scenario, tmp_path)
    play(after, tmp_path)
