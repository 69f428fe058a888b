"""Drafts: a plan and its preview, whose segments are rolled again until somebody approves."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import httpx

from arlon_ray.generation.video import read_video
from serve.work import Decoded, Frame, Job, Timed, Tokens
from tests.serve.play import play, until
from tests.serve.stages import FakeStages


async def draft(client: httpx.AsyncClient, **body: object) -> dict:
    """A draft that is finished."""
    response = await client.post("/v1/drafts", json=body)
    assert response.status_code == 200, response.text
    assert (response.json()["object"], response.json()["status"]) == ("draft", "queued")
    return await until(client, response.json()["id"], "completed", "failed")


async def plan_of(client: httpx.AsyncClient, name: str) -> list[list[int]]:
    segments = (await client.get(f"/v1/drafts/{name}/tokens")).json()["segments"]
    assert [segment["shape"] for segment in segments] == [[2, 1, 1]] * len(segments)
    return [segment["tokens"] for segment in segments]


def test_from_draft_to_video(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        made = await draft(client, prompt="a", num_segments=3, seed=2)
        assert (made["status"], made["progress"], stages.rendered) == ("completed", 100, [])
        assert await plan_of(client, made["id"]) == [[200, 201], [201, 202], [202, 203]]
        assert stages.previewed == [[200, 201], [202], [203]]  # what is new of each segment
        preview = await client.get(f"/v1/drafts/{made['id']}/content")
        assert len(read_video(io.BytesIO(preview.content))) == 34 + 2 * 17
        picture = await client.get(f"/v1/drafts/{made['id']}/content", params={"variant": "thumbnail"})
        assert picture.headers["content-type"] == "image/png"
        stages.planned.clear()
        asked = {"draft": made["id"], "num_inference_steps": 3}
        video = await until(client, (await client.post("/v1/videos", json=asked)).json()["id"], "completed", "failed")
        assert (video["status"], video["draft_id"], video["seed"]) == ("completed", made["id"], 2)
        assert stages.planned == []  # what was approved is what is rendered
        assert [tokens[:, 0, 0].tolist() for tokens in stages.tokens if tokens is not None] == [
            [200, 201], [201, 202], [202, 203],
        ]  # fmt: skip
        assert [video["id"]] == [each["id"] for each in (await client.get("/v1/videos")).json()["data"]]
        assert [made["id"]] == [each["id"] for each in (await client.get("/v1/drafts")).json()["data"]]
        assert (await client.get(f"/v1/videos/{made['id']}")).status_code == 404  # each under its own address
        assert (await client.delete(f"/v1/drafts/{made['id']}")).json()["object"] == "draft.deleted"

    play(scenario, tmp_path)


def test_a_segment_is_rolled_again_and_the_others_stay(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        made = await draft(client, prompt="a", num_segments=4, seed=0)
        stages.planned.clear()
        answer = await client.post(f"/v1/drafts/{made['id']}/segments/1/reroll", json={"seed": 5, "prompt": "b"})
        assert (answer.json()["status"], answer.json()["segments"][1]["status"]) == ("queued", "queued")
        again = await until(client, made["id"], "completed", "failed")
        assert [index for _, index in stages.planned] == [1]
        # the segment after takes over what it overlaps with, and keeps the rest
        assert await plan_of(client, made["id"]) == [[0, 1], [501, 502], [502, 3], [3, 4]]
        assert [segment["seed"] for segment in again["segments"]] == [0, 5, 0, 0]
        assert [segment["prompt"] for segment in again["segments"]] == ["a", "b", "a", "a"]
        preview = await client.get(f"/v1/drafts/{made['id']}/content")
        assert len(read_video(io.BytesIO(preview.content))) == 34 + 3 * 17
        events = (await client.get(f"/v1/drafts/{made['id']}/events")).text
        assert events.count("event: segment.reset") == 1 and events.count("event: completed") == 2
        stages.planned.clear()
        await client.post(f"/v1/drafts/{made['id']}/segments/2/reroll", json={"seed": 6, "following": "replan"})
        await until(client, made["id"], "completed", "failed")
        assert [index for _, index in stages.planned] == [2, 3]
        assert (await plan_of(client, made["id"]))[1:] == [[501, 502], [602, 603], [603, 604]]

    play(scenario, tmp_path)


def test_a_cut_stays_where_it_is(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        befores: list[bool] = []
        plain = stages.preview

        async def preview(job: Job, index: int, tokens: Tokens, before: Frame | None) -> Timed[Decoded]:
            befores.append(before is not None)
            return await plain(job, index, tokens, before)

        stages.preview = preview  # type: ignore[method-assign]
        segments = [{"prompt": "a"}, {"prompt": "b", "cut": True}, {"prompt": "b"}]
        made = await draft(client, segments=segments)
        assert befores == [False, False, True]
        await client.post(f"/v1/drafts/{made['id']}/segments/1/reroll", json={"seed": 5, "prompt": "c"})
        again = (await until(client, made["id"], "completed", "failed"))["segments"]
        assert [(segment["prompt"], segment["cut"]) for segment in again] == [("a", False), ("c", True), ("b", False)]
        await until(client, (await client.post("/v1/videos", json={"draft": made["id"]})).json()["id"], "completed")
        assert [overlap is None for overlap in stages.overlaps] == [True, True, False]

    play(scenario, tmp_path)


def test_rolling_again_survives_the_end_of_the_process(tmp_path: Path) -> None:
    names: list[str] = []

    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        names.append((await draft(client, prompt="a", num_segments=3, seed=0))["id"])

        async def preview(*_: object) -> None:
            await asyncio.Event().wait()

        stages.preview = preview  # type: ignore[method-assign, assignment]
        await client.post(f"/v1/drafts/{names[0]}/segments/1/reroll", json={"seed": 5})
        await until(client, names[0], "in_progress")
        await asyncio.sleep(0.1)

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        await until(client, names[0], "completed")
        assert await plan_of(client, names[0]) == [[0, 1], [501, 502], [502, 3]]

    play(before, tmp_path)
    play(after, tmp_path)


def test_what_cannot_be_drafted_or_rendered(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        made = await draft(client, prompt="a", num_segments=2)
        for body, status, param in (
            ({"draft": made["id"], "prompt": "b"}, 400, "prompt"),
            ({"draft": made["id"], "seed": 1}, 400, "seed"),
            ({"draft": "draft_0"}, 404, "draft_id"),
            ({"draft": (await client.post("/v1/videos", json={"prompt": "a"})).json()["id"]}, 404, "draft_id"),
        ):
            answer = await client.post("/v1/videos", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), body
        assert (await client.post("/v1/drafts", json={"prompt": "a", "baseline": True})).status_code == 400
        where = f"/v1/drafts/{made['id']}/segments"
        assert (await client.post(f"{where}/2/reroll", json={})).status_code == 404
        assert (await client.post(f"{where}/x/reroll", json={})).status_code == 400
        assert (await client.post(f"{where}/0/reroll", json={"prompt": " "})).status_code == 400
        stages.gate.clear()
        answers = await asyncio.gather(*(client.post(f"{where}/0/reroll", json={}) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]

    play(scenario, tmp_path)
