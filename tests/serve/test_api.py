"""The API over stages of one process: queue, statuses, cancellation, errors. No Ray."""

from __future__ import annotations

import asyncio
import contextvars
import io
import json
import weakref
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from arlon_ray.generation.video import read_video
from serve.schema import RequestError, VideoRequest
from serve.service import VideoService
from serve.work import Job
from tests.serve.play import play, post, serve_alone, until
from tests.serve.stages import FakeStages


def test_from_request_to_file(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        created = await post(client, segments=[{"prompt": "one"}, {"prompt": "two"}], num_segments=4, seed=7)
        assert (created["status"], created["progress"], created["seed"]) == ("queued", 0, 7)
        video = await until(client, created["id"], "completed", "failed")
        assert (video["status"], video["progress"], video["error"]) == ("completed", 100, None)
        assert [segment["prompt"] for segment in video["segments"]] == ["one", "one", "two", "two"]
        assert {segment["status"] for segment in video["segments"]} == {"completed"}
        assert all(None not in timing.values() for timing in video["timings"])
        content = await client.get(f"/v1/videos/{video['id']}/content")
        assert content.headers["content-type"] == "video/mp4"
        frames = len(read_video(io.BytesIO(content.content)))
        assert frames == 34 + 3 * 17 == sum(segment["frames"] for segment in video["segments"])
        assert float(video["seconds"]) == frames / 16
        # every segment got its own tokens and the last five latents of the one before
        assert [int(tokens[0, 0, 0]) for tokens in stages.tokens if tokens is not None] == [700, 701, 702, 703]
        assert stages.overlaps[0] is None
        starts = [overlap[0, :, 0, 0].tolist() for overlap in stages.overlaps[1:] if overlap is not None]
        assert starts == [[5, 6, 7, 8, 9], [100, 101, 102, 103, 104], [200, 201, 202, 203, 204]]
        kept = sorted(entry.name for entry in (tmp_path / "videos" / video["id"]).iterdir())
        assert kept == ["end.safetensors", "video.mp4"]
        streamed = await client.get(f"/v1/videos/{video['id']}/stream")
        assert streamed.headers["content-type"] == "video/mp4" and streamed.content == content.content
        missing = await client.get("/v1/videos/video_0/stream")
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "video_id")

    play(scenario, tmp_path)


def test_segments_can_be_watched_while_the_rest_is_made(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        plain, go_on = stages.render, asyncio.Event()

        async def render(job: Job, index: int, *others: Any) -> Any:
            if index == 2:
                await go_on.wait()
            return await plain(job, index, *others)

        stages.render = render  # type: ignore[method-assign]
        created = await service.create(VideoRequest(prompt="a", num_segments=4))
        early, late, got = await service.stream(created.id), await service.stream(created.id), b""
        while not got or len(read_video(io.BytesIO(got))) < 34 + 17:
            got += await anext(early)
        assert (await service.get(created.id)).status == "in_progress"
        first = await anext(late)
        assert got.startswith(first) and not go_on.is_set()
        go_on.set()
        whole = got + b"".join([piece async for piece in early])
        assert whole == first + b"".join([piece async for piece in late])
        frames = read_video(io.BytesIO(whole))
        assert (await service.get(created.id)).status == "completed"
        assert (
            np.array_equal(frames, read_video((await service.content(created.id)).file)) and len(frames) == 34 + 3 * 17
        )
        # a finished one is the file itself, and one that is waiting is streamed when its turn comes
        assert (
            b"".join([piece async for piece in await service.stream(created.id)])
            == (await service.content(created.id)).file.read()
        )
        running, waiting = [(await service.create(VideoRequest(prompt="a"))).id for _ in range(2)]
        streams = await asyncio.gather(service.stream(running), service.stream(waiting))
        assert [len(read_video(io.BytesIO(b"".join([p async for p in pieces])))) for pieces in streams] == [34, 34]

    serve_alone(scenario, tmp_path)


def test_a_stream_ends_with_its_video(tmp_path: Path) -> None:
    async def scenario(service: VideoService, stages: FakeStages) -> None:
        stages.fail_at = 2
        failing = await service.create(VideoRequest(prompt="a", num_segments=4))
        seen = b"".join([piece async for piece in await service.stream(failing.id)])
        assert len(read_video(io.BytesIO(seen))) in (34, 34 + 17)  # what is being decoded is given up, and all of it
        with pytest.raises(RequestError) as failed:
            await service.stream(failing.id)
        stages.gate.clear()
        stopped = [(await service.create(VideoRequest(prompt="a"))).id for _ in range(2)]
        watched = [await service.stream(video_id) for video_id in stopped]
        seeing = [asyncio.create_task(anext(pieces, b"")) for pieces in watched]  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        for video_id in stopped:
            await service.delete(video_id)
        assert await asyncio.gather(*seeing) == [b"", b""]
        assert failed.value.code == "video_failed"

    serve_alone(scenario, tmp_path)


def test_an_overlap_longer_than_what_is_new_reaches_further_back(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        await until(client, (await post(client, prompt="a", num_segments=3))["id"], "completed")
        last = stages.overlaps[2]
        assert last is not None
        # segments of three groups with an overlap of two: each adds one group
        assert last[0, :, 0, 0].tolist() == [10, 11, 12, 13, 14, 100, 101, 102, 103, 104]

    play(scenario, tmp_path, "segment.groups=3", "segment.overlap_groups=2")


def test_what_a_prompt_began_with_is_handed_on(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        segments = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "b"}]
        made = await until(client, (await post(client, segments=segments))["id"], "completed")
        body = {"prompt": "b", "seconds": "1", "video": {"id": made["id"]}}
        extended = (await client.post("/v1/videos/extensions", json=body)).json()
        await until(client, extended["id"], "completed")
        first, *others = [None if each is None else each[0, :, 0, 0].tolist() for each in stages.overlaps]
        assert first is None
        begins = [0, 1, 2, 3, 4], [300, 301, 302, 303, 304]
        ends = [[5, 6, 7, 8, 9], *([100 * n, *range(100 * n + 1, 100 * n + 5)] for n in range(1, 5))]
        expected = [begins[0] + ends[0], begins[0] + ends[1], ends[2], begins[1] + ends[3], begins[1] + ends[4]]
        assert others == expected

    play(scenario, tmp_path, "dit.anchor_groups=1")


def test_a_cut_takes_nothing_over(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        segments = [{"prompt": "a"}, {"prompt": "b", "cut": True}, {"prompt": "c"}]
        made = await until(client, (await post(client, segments=segments))["id"], "completed")
        assert [segment["cut"] for segment in made["segments"]] == [False, True, False]
        assert (made["seconds"], [segment["frames"] for segment in made["segments"]]) == ("4.25", [34, 17, 17])
        short = {"prompt": "c", "seconds": 1e-5, "video": {"id": made["id"]}}
        assert len((await client.post("/v1/videos/extensions", json=short)).json()["segments"]) == 4
        body = {"prompt": "c", "num_segments": 2, "cut": True, "video": {"id": made["id"]}}
        extended = (await client.post("/v1/videos/extensions", json=body)).json()
        again = (await until(client, extended["id"], "completed"))["segments"]
        assert [segment["cut"] for segment in again] == [False, True, False, True, False]
        assert [each is None for each in stages.overlaps] == [True, True, False, False, True, False]
        # nor is what is seen blended into it: the picture of a segment with a frame before it is another one
        video = read_video(io.BytesIO((await client.get(f"/v1/videos/{extended['id']}/content")).content))
        assert [int(video[frame, 0, 0, 0]) // 10 for frame in (34, 68)] == [10, 4]  # 100, and 300 less 256

    play(scenario, tmp_path)


def test_each_shot_is_whole_segments_and_no_more_than_the_limit(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        parts = [{"prompt": str(i), "seconds": 1.2, "cut": True} for i in range(3)]  # 19.2 frames: 34, then 2 × 17
        made = await post(client, segments=parts[:2])
        assert [(segment["prompt"], segment["cut"]) for segment in made["segments"]] == [
            ("0", False), ("1", True), ("1", False),
        ]  # fmt: skip
        refused = await client.post("/v1/videos", json={"segments": parts})
        assert (refused.status_code, refused.json()["error"]["message"]) == (400, "at most 4 segments (5.3125 s)")

    play(scenario, tmp_path, "serve.max_segments=4")


def test_the_model_is_named_as_requests_may_name_it(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        listed = (await client.get("/v1/models")).json()
        (model,) = listed["data"]
        assert (listed["object"], model["object"], model["id"]) == ("list", "model", stages.config.name)
        assert (await client.get(f"/v1/models/{model['id']}")).json() == model
        await post(client, prompt="a", model=model["id"])
        for path in ("/v1/models/sora-2", "/v1/models/a/b"):
            missing = await client.get(path)
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

    play(scenario, tmp_path)


def test_the_baseline_has_no_plan(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, (await post(client, prompt="a", num_segments=2, baseline=True))["id"], "completed")
        assert (stages.planned, stages.tokens) == ([], [None, None])
        assert video["baseline"] and video["timings"][1]["ar_s"] is None and video["timings"][1]["dit_s"] is not None

    play(scenario, tmp_path)


def test_planning_stays_within_its_window(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        created = await post(client, prompt="a", num_segments=6)
        await until(client, created["id"], "in_progress")
        await asyncio.sleep(0.2)
        assert [index for _, index in stages.planned] == [0, 1, 2]  # 0 is being rendered, and two are ahead
        stages.gate.set()
        await until(client, created["id"], "completed")
        assert [index for _, index in stages.planned] == [0, 1, 2, 3, 4, 5]
        assert stages.closed_plans == 1

    play(scenario, tmp_path, "serve.planned_ahead=2")


def test_the_queue_is_bounded_and_honest(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        accepted = [(await post(client, prompt="a"))["id"] for _ in range(3)]
        await until(client, accepted[0], "in_progress")
        refused = await client.post("/v1/videos", json={"prompt": "a"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        await asyncio.sleep(0.1)
        assert [(await client.get(f"/v1/videos/{name}")).json()["status"] for name in accepted[1:]] == ["queued"] * 2
        health = (await client.get("/healthz")).json()
        assert (health["queued"], health["running"]) == (2, 1)
        stages.gate.set()
        for name in accepted:
            await until(client, name, "completed")
        assert [name for name, _ in stages.rendered] == accepted
        assert stages.most_alive == 1

    play(scenario, tmp_path, "serve.max_queued=2")


def test_simultaneous_requests_do_not_slip_past_the_bound(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        answers = await asyncio.gather(*(client.post("/v1/videos", json={"prompt": "a"}) for _ in range(12)))
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 9

    play(scenario, tmp_path, "serve.max_queued=2")


def test_delete_stops_the_work_and_removes_all_traces(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        running, waiting, after = [(await post(client, prompt="a", num_segments=3))["id"] for _ in range(3)]
        await until(client, running, "in_progress")
        assert (await client.get(f"/v1/videos/{running}/content")).status_code == 409
        answer = await client.delete(f"/v1/videos/{waiting}")
        assert answer.json() == {"id": waiting, "object": "video.deleted", "deleted": True}
        assert (await client.delete(f"/v1/videos/{running}")).status_code == 200
        assert stages.cancelled == [running]
        stages.gate.set()
        await until(client, after, "completed")
        assert {name for name, _ in stages.rendered} == {after}
        assert [entry.name for entry in (tmp_path / "videos").iterdir()] == [after]
        for name in (running, waiting):
            assert (await client.get(f"/v1/videos/{name}")).status_code == 404
        assert (await client.delete(f"/v1/videos/{running}")).status_code == 404

    play(scenario, tmp_path)


def test_a_failure_is_told_without_inner_details(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.fail_at = 1
        failed = await until(client, (await post(client, prompt="a", num_segments=3))["id"], "failed", "completed")
        assert failed["error"] == {
            "code": "generation_failed",
            "message": "segment 1: rendering failed (MemoryError)",
        }
        assert stages.closed_plans == 1
        content = await client.get(f"/v1/videos/{failed['id']}/content")
        assert (content.status_code, content.json()["error"]["code"]) == (409, "video_failed")
        stages.fail_at = None
        await until(client, (await post(client, prompt="a"))["id"], "completed")

    play(scenario, tmp_path)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x" * 1001}, 400, "prompt"),
        ({"prompt": "a", "size": "1280x720"}, 400, "size"),
        ({"prompt": "a", "seconds": "1e9"}, 400, "seconds"),
        ({"prompt": "a", "seconds": "soon"}, 400, "seconds"),
        ({"prompt": "a", "num_segments": "4"}, 400, "num_segments"),
        ({"prompt": "a", "promt": "b"}, 400, "promt"),
        ({"segments": [{"prompt": "a"}, {"prompt": " "}]}, 400, "segments.1.prompt"),
        ({"segments": [{}]}, 400, "segments.0.prompt"),
        ([1], 400, None),
        ("{", 400, None),
        ('{"prompt": "\\ud800"}', 400, "prompt"),
        ('{"prompt": "a", "\\ud800": 1}', 400, None),
    ],
)
def test_bad_bodies_name_the_field(tmp_path: Path, body: Any, status: int, param: str | None) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        response = await client.post("/v1/videos", content=text, headers={"content-type": "application/json"})
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["type"]) == (param, "invalid_request_error")
        assert (await client.get("/v1/videos")).json()["data"] == []

    play(scenario, tmp_path)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "one two three four five"}, "prompt"),
        ({"segments": [{"prompt": "one"}, {"prompt": "one two three four five"}]}, "segments.1.prompt"),
    ],
)
def test_prompts_longer_than_the_text_encoder_takes_are_refused(tmp_path: Path, body: dict, param: str) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        response = await client.post("/v1/videos", json=body)
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
        assert error["message"] == "the prompt has 5 tokens, at most 4 are allowed"
        await post(client, prompt=" one two three four ")

    play(
        scenario,
        tmp_path,
        "text.max_tokens=4",
        "dit.model_max_length=4",
        count_tokens=lambda text: len(text.split(" ")),
    )


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/v1/videos/video_0", 404, "video_id"),
        ("/v1/videos/..%2F..%2Fetc%2Fpasswd/content", 404, None),
        ("/v1/videos/'%20OR%201=1/content", 404, "video_id"),
        ("/v1/nothing", 404, None),
        ("/v1/videos?limit=0", 400, "limit"),
        ("/v1/videos?order=up", 400, "order"),
        ("/v1/videos?after=unknown", 400, "after"),
    ],
)
def test_bad_addresses(tmp_path: Path, path: str, status: int, param: str | None) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        response = await client.get(path)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)

    play(scenario, tmp_path)


def test_head_of_a_file_is_get_without_the_file(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.gate.clear()
        video = (await post(client, prompt="a"))["id"]
        where = f"/v1/videos/{video}/content"
        assert (await client.head(where)).status_code == 409
        stages.gate.set()
        await until(client, video, "completed")
        for query in ({}, {"variant": "thumbnail"}):
            got, head = await client.get(where, params=query), await client.head(where, params=query)
            assert (head.status_code, head.content) == (200, b"") and len(got.content) > 0
            assert head.headers.pop("x-request-id") != got.headers.pop("x-request-id")
            assert head.headers == got.headers and int(head.headers["content-length"]) == len(got.content)
        assert (await client.head("/v1/videos/video_0/content")).status_code == 404

    play(scenario, tmp_path)


def test_what_may_be_done_instead_is_named_whole(tmp_path: Path) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        for method, path, allowed in (
            ("PUT", "/v1/videos", "GET, POST"),
            ("POST", "/v1/videos/video_0", "GET, DELETE"),
            ("PATCH", "/v1/videos/extensions", "GET, POST, DELETE"),
            ("POST", "/v1/drafts/draft_0/content", "GET, HEAD"),
            ("HEAD", "/v1/videos/video_0/events", "GET"),
            ("GET", "/v1/videos/video_0/remix", "POST"),
            ("DELETE", "/", "GET, HEAD"),
        ):
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), (method, path)

    play(scenario, tmp_path)


def test_the_work_outlives_the_context_of_its_request(tmp_path: Path) -> None:
    """Serve cancels calls made in a request's context with that request."""
    context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="none")
    seen = []

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        plain = stages.render

        async def render(*arguments: Any) -> Any:
            seen.append(context.get())
            return await plain(*arguments)

        stages.render = render  # type: ignore[method-assign]
        context.set("request")
        await until(client, (await post(client, prompt="a"))["id"], "completed")

    play(scenario, tmp_path)
    assert seen == ["none"]


def test_latents_held_do_not_grow_with_the_video(tmp_path: Path) -> None:
    """Only the latest segment's latents are alive, however many came before."""
    held: list[int] = []

    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        alive: list[weakref.ref[np.ndarray]] = []
        plain = stages.render

        async def render(*arguments: Any) -> Any:
            held.append(sum(reference() is not None for reference in alive))
            result = await plain(*arguments)
            alive.append(weakref.ref(result.value))
            return result

        stages.render = render  # type: ignore[method-assign]
        stages.overlaps = _Forget()
        await until(client, (await post(client, prompt="a", num_segments=12))["id"], "completed")

    play(scenario, tmp_path)
    assert len(held) == 12
    assert max(held) <= 2


class _Forget(list):
    """A list that keeps nothing."""

    def append(self, _: object) -> None: ...
