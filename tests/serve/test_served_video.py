"""A real bundle behind a real Ray Serve: from HTTP request to mp4."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import av
import httpx
import numpy as np
import psutil
import pytest

from arlon_ray.bundle import load_bundle
from arlon_ray.config import Config
from arlon_ray.generation import Cut, VideoGenerator, default_options
from arlon_ray.generation.video import encode_fragment, join_fragments, read_video
from benchmarks.serve_load import load
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.app import APP, serve_bundle
from serve.deployments import AR, DECODER, DIT
from serve.ingress import API
from tests.bundles import make_random_bundle
from tests.serve.collector import Collector, collecting

pytestmark = pytest.mark.ray

PROMPTS = ["a red ball rolls to the left", "a blue square falls"]


@dataclass(frozen=True)
class Served:
    client: httpx.Client
    config: Config
    bundle: Path
    data: Path
    collector: Collector

    def post(self, **body: object) -> dict:
        response = self.client.post("/v1/videos", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def until(self, video_id: str, *statuses: str, limit_s: float = 50) -> dict:
        deadline = time.monotonic() + limit_s
        video = {}
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):  # the ingress may be on its way back
                answer = self.client.get(f"/v1/{_kind(video_id)}/{video_id}")
                if answer.status_code == 200 and (video := answer.json())["status"] in statuses:
                    return video
            time.sleep(0.02)
        raise AssertionError(f"still {video}")

    def content(self, video_id: str) -> bytes:
        """The mp4 of a video, or the preview of a draft."""
        answer = self.client.get(f"/v1/{_kind(video_id)}/{video_id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def finished(self, video_id: str) -> int:
        """Segments whose frames can be seen."""
        segments = self.client.get(f"/v1/{_kind(video_id)}/{video_id}").json()["segments"]
        return sum(segment["status"] == "completed" for segment in segments)

    def steps(self) -> int:
        """Denoising steps that the DiT's replica has begun."""
        from ray import serve

        return serve.get_deployment_handle(DIT, APP).statistics.remote().result()["steps"]


def _kind(name: str) -> str:
    return "drafts" if name.startswith("draft_") else "videos"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    single = [f"serve.{stage}.max_replicas=1" for stage in ("ar", "dit", "decoder")]
    bundle = make_random_bundle(
        folder / "bundle", "dit.depth=6", "dit.hidden_size=64", f"serve.port={free_port()}", "serve.max_running=1",
        "serve.max_queued=1", "sampling.continued_guidance=0.5", "serve.trace_exporter=serve.otlp:processors", *single,
    )  # fmt: skip
    opened = load_bundle(bundle)
    config, data = opened.config, folder / "data"
    with pytest.MonkeyPatch.context() as patch, collecting() as collector:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with connect(config), serve_bundle(config, opened, data) as url, httpx.Client(base_url=url) as client:
            yield Served(client, config, bundle, data, collector)


def frames_in(begun: bytes) -> int:
    """Frames that can be decoded of a file that is not all there."""
    try:
        return len(read_video(io.BytesIO(begun)))
    except (av.error.FFmpegError, ValueError):
        return 0


def test_two_prompts_over_four_segments(served: Served, tmp_path: Path) -> None:
    decord = pytest.importorskip("decord")
    created = served.post(
        segments=[{"prompt": prompt} for prompt in PROMPTS], num_segments=4, seed=11, num_inference_steps=6
    )
    assert created["status"] == "queued"
    with served.client.stream("GET", f"/v1/videos/{created['id']}/stream", timeout=50) as watched:
        pieces = watched.iter_bytes()
        first = next(pieces)
        while (seen := frames_in(first)) < 34:  # a segment may come in several pieces
            first += next(pieces)
        assert seen == 34
        assert served.client.get(f"/v1/videos/{created['id']}").json()["status"] == "in_progress"
        streamed = first + b"".join(pieces)
    video = served.until(created["id"], "completed", "failed")
    assert video["status"] == "completed", video["error"]
    assert [segment["prompt"] for segment in video["segments"]] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2

    path = tmp_path / "video.mp4"
    path.write_bytes(served.client.get(f"/v1/videos/{video['id']}/content").content)
    segment = served.config.segment
    expected = segment.groups * 17 + 3 * (segment.groups - segment.overlap_groups) * 17
    assert len(decord.VideoReader(str(path), num_threads=1)) == expected
    assert np.array_equal(read_video(io.BytesIO(streamed)), read_video(path))
    assert read_video(path).shape == (expected, served.config.video.height, served.config.video.width, 3)

    # the AR plans the next segment before the DiT is done with this one
    times = video["timings"]
    for now, following in itertools.pairwise(times):
        assert following["ar_start_s"] < now["dit_start_s"] + now["dit_s"]
        assert following["dit_start_s"] >= now["dit_start_s"] + now["dit_s"] - 0.002
        assert now["decode_start_s"] >= now["dit_start_s"] + now["dit_s"] - 0.002


def test_one_request_is_one_trace_across_the_deployments(served: Served) -> None:
    trace, caller = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    asked = {"prompt": PROMPTS[0], "num_segments": 2, "seed": 3}
    headers = {"traceparent": f"00-{trace}-{caller}-01", "x-request-id": "traced"}
    video = served.client.post("/v1/videos", json=asked, headers=headers).json()["id"]
    served.until(video, "completed")

    (whole,) = served.collector.of(trace, "arlon.video", 1)
    assert whole.about == {"arlon.job": video, "arlon.segments": 2, "arlon.request_id": "traced"}
    assert not whole.error
    for stage, call, deployment in (("ar", "planning", AR), ("dit", "rendering", DIT), ("decode", "decoding", DECODER)):
        worked = served.collector.of(trace, f"arlon.{stage}", 2)
        assert [span.about for span in worked] == [{"arlon.job": video, "arlon.segment": k} for k in range(2)]
        for span in worked:
            above = served.collector.above(span, f"arlon.{call}")
            assert any(name.startswith(f"replica_handle_request {deployment} ") for name in above), above
            assert "arlon.video" in above
            assert whole.start < span.start < span.end < whole.end
    # and all of it began with the caller's own span
    assert served.collector.tops(trace, caller) == {caller}
    assert not [span for span in served.collector.spans.values() if span.name.endswith(" told")]


@pytest.mark.parametrize("baseline", [False, True])
def test_served_and_in_process_make_the_same_video(served: Served, tmp_path: Path, baseline: bool) -> None:
    created = served.post(prompt=PROMPTS[0], num_segments=2, seed=5, baseline=baseline)
    served.until(created["id"], "completed")
    path = tmp_path / "served.mp4"
    path.write_bytes(served.client.get(f"/v1/videos/{created['id']}/content").content)

    generator = VideoGenerator.from_bundle(served.bundle)
    options = default_options(served.config.sampling, baseline=baseline)
    segments = generator.generate([PROMPTS[0]] * 2, 5, options)
    fps = served.config.video.fps
    own = join_fragments([encode_fragment(frames, fps) for frames in segments], tmp_path / "own.mp4")
    difference = np.abs(read_video(path).astype(int) - read_video(own).astype(int))
    assert difference.mean() < 0.5  # the number of threads may change the last bits


def test_a_client_that_goes_away_stops_the_work_within_one_step(served: Served) -> None:
    created = served.post(prompt=PROMPTS[0], num_inference_steps=1000)
    where = f"/v1/videos/{created['id']}/events?stop_on_disconnect=true"
    with served.client.stream("GET", where, timeout=50) as watched:
        for line in watched.iter_lines():
            if "segment.step" in line:
                break
    while served.client.get(f"/v1/videos/{created['id']}").status_code == 200:
        time.sleep(0.01)
    at_end = served.steps()
    time.sleep(1.0)
    assert served.steps() <= at_end + 1


def test_delete_stops_within_one_denoising_step(served: Served) -> None:
    created = served.post(prompt=PROMPTS[0], num_inference_steps=1000)
    before = served.steps()
    while served.steps() < before + 3:
        time.sleep(0.01)
    assert served.client.delete(f"/v1/videos/{created['id']}").json()["deleted"]
    at_answer = served.steps()
    time.sleep(1.0)
    assert served.steps() <= at_answer + 1
    assert at_answer < before + 900
    assert served.client.get(f"/v1/videos/{created['id']}").status_code == 404
    assert not (served.data / "videos" / created["id"]).exists()
    # and the replica works on
    served.until(served.post(prompt=PROMPTS[0])["id"], "completed")


def test_many_clients_see_nothing_that_is_not_true(served: Served) -> None:
    """The load test, small: more clients than may wait, which are refused and come again."""
    seen = asyncio.run(load(str(served.client.base_url), clients=4, seconds=6, segments=2))
    assert seen["wrong"] == [] and seen["lost"] == seen["left"] == 0 < seen["refused_429"]
    assert set(seen["videos"]) == {"completed"} and seen["videos"]["completed"] >= 3


def kill(deployment: str) -> None:
    """SIGKILL the deployment's replica."""
    title = f"ServeReplica:{APP}:{deployment}"
    found = [each for each in psutil.Process().children(recursive=True) if title in " ".join(each.cmdline())]
    for process in found:
        process.kill()
    assert found


@pytest.mark.slow
def test_whatever_replica_is_killed_the_video_is_what_it_would_have_been(served: Served) -> None:
    request = {"prompt": PROMPTS[0], "num_segments": 8, "seed": 3, "num_inference_steps": 4}
    expected = served.content(served.until(served.post(**request)["id"], "completed", "failed")["id"])
    for deployment, at in ((DIT, 1), (AR, 2), (DECODER, 3), (API, 4)):
        created = served.post(**request)
        while served.finished(created["id"]) < at:
            time.sleep(0.02)
        kill(deployment)
        video = served.until(created["id"], "completed", "failed", limit_s=90)
        assert video["status"] == "completed", (deployment, video["error"])
        assert served.content(video["id"]) == expected, deployment
        assert len(video["segments"]) == 8


def test_drafts_remixes_and_extensions(served: Served) -> None:
    draft = served.client.post("/v1/drafts", json={"prompt": PROMPTS[0], "num_segments": 3, "seed": 4}).json()
    draft = served.until(draft["id"], "completed", "failed")
    assert draft["status"] == "completed", draft["error"]
    preview = read_video(io.BytesIO(served.content(draft["id"])))
    plan = served.client.get(f"/v1/drafts/{draft['id']}/tokens").json()["segments"]
    direct = served.content(
        served.until(served.post(prompt=PROMPTS[0], num_segments=3, seed=4)["id"], "completed")["id"]
    )
    rendered = served.until(served.post(draft=draft["id"])["id"], "completed", "failed")
    # what is approved and rendered is what would have been rendered at once
    assert served.content(rendered["id"]) == direct and len(preview) == len(read_video(io.BytesIO(direct)))
    served.client.post(f"/v1/drafts/{draft['id']}/segments/1/reroll", json={"seed": 9})
    served.until(draft["id"], "completed", "failed")
    again = served.client.get(f"/v1/drafts/{draft['id']}/tokens").json()["segments"]
    assert again[0] == plan[0] and again[1] != plan[1] and again[2]["tokens"][-16:] == plan[2]["tokens"][-16:]

    short = served.until(served.post(prompt=PROMPTS[0], num_segments=2, seed=4)["id"], "completed")
    body = {"prompt": PROMPTS[0], "num_segments": 1, "video": {"id": short["id"]}}
    longer = served.client.post("/v1/videos/extensions", json=body).json()
    served.until(longer["id"], "completed", "failed")
    frames = [read_video(io.BytesIO(data)) for data in (served.content(longer["id"]), direct)]
    assert np.array_equal(*frames)  # what a longer video would have been
    cut = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "cut": True}, {"prompt": PROMPTS[1]}]
    shots = served.until(served.post(segments=cut, seed=4)["id"], "completed", "failed")
    alone = VideoGenerator(load_bundle(served.bundle)).generate([PROMPTS[0], Cut(PROMPTS[1]), PROMPTS[1]], 4)
    joined = join_fragments([encode_fragment(part, served.config.video.fps) for part in alone], served.data / "cut.mp4")
    assert np.array_equal(read_video(io.BytesIO(served.content(shots["id"]))), read_video(joined))
    remix = served.client.post(f"/v1/videos/{short['id']}/remix", json={"prompt": PROMPTS[1]}).json()
    assert served.content(served.until(remix["id"], "completed")["id"]) != served.content(short["id"])


def test_events_tell_steps(served: Served) -> None:
    created = served.post(prompt=PROMPTS[0], num_segments=2, num_inference_steps=200)
    with served.client.stream("GET", f"/v1/videos/{created['id']}/events", timeout=50) as watched:
        lines = list(watched.iter_lines())
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds[-1] == "completed" and kinds.count("segment.completed") == 2
    steps = [json.loads(line.removeprefix("data: ")) for line in lines if '"steps"' in line]
    assert {step["index"] for step in steps} == {0, 1} and all(step["steps"] == 200 for step in steps)
    assert len({(step["index"], step["step"]) for step in steps}) >= 6  # of quick ones, some (`StepNews`)


def test_the_queue_refuses_and_says_when_to_come_back(served: Served) -> None:
    first, second = (served.post(prompt="a", num_inference_steps=1000) for _ in range(2))
    served.until(first["id"], "in_progress")
    refused = served.client.post("/v1/videos", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert served.client.get(f"/v1/videos/{second['id']}").json()["status"] == "queued"
    assert served.client.get(f"/v1/videos/{first['id']}/content").status_code == 409
    about = {"status": "ok", "model": "tiny", "bundle": load_bundle(served.bundle).fingerprint[:12], "change": "none"}
    assert served.client.get("/healthz").json() == {**about, "queued": 1, "running": 1}
    for video in (second, first):
        assert served.client.delete(f"/v1/videos/{video['id']}").status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a", "size": "8x8"}, "size"),
        ({"promt": "a"}, "promt"),
        ({"segments": [{"prompt": "a"}, {"prompt": "circle " * 100}]}, "segments.1.prompt"),
    ],
)
def test_bad_requests_name_the_field(served: Served, body: dict, param: str) -> None:
    response = served.client.post("/v1/videos", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_unknown_videos_are_not_found(served: Served) -> None:
    for path in ("/v1/videos/video_0", "/v1/videos/video_0/content"):
        response = served.client.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
