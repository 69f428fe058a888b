"""Replicas follow the work of their own deployment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray import serve

from arlon_ray.bundle import load_bundle
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.app import APP, serve_bundle
from serve.deployments import AR, DECODER, DIT, bind_stages
from serve.scaling import PAUSED, replicas_for_work
from tests.bundles import make_random_bundle, small_config


def context(requests: float, target: float, **paused: float) -> SimpleNamespace:
    config = SimpleNamespace(get_target_ongoing_requests=lambda: target)
    metrics = {PAUSED: paused} if paused else {}
    return SimpleNamespace(total_num_requests=requests, aggregated_metrics=metrics, config=config)


@pytest.mark.parametrize(
    ("requests", "target", "paused", "expected"),
    [
        (0, 2, {}, 0),
        (1, 2, {}, 1),
        (5, 2, {}, 3),
        (4, 2, {}, 2),
        (4.01, 2, {}, 2),  # what an average leaves of a call that is over
        (6, 1, {"a": 3, "b": 2}, 1),  # six plans, of which one may go on
        (2, 1, {"a": 2}, 0),
        (1, 1, {"a": 3}, 0),  # the two are measured at different times
    ],
)
def test_replicas(requests: float, target: float, paused: dict[str, float], expected: int) -> None:
    assert replicas_for_work(context(requests, target, **paused))[0] == expected


@pytest.mark.parametrize(("most", "target"), [(1, 4), (4, 4), (9, 2.5)])
def test_as_many_videos_are_made_as_keep_all_replicas_at_work(most: int, target: float) -> None:
    """What waits for its turn is not seen by the policy."""
    settings = [f"serve.dit.max_replicas={most}", f"serve.dit.target_ongoing_requests={target}"]
    serving = small_config("serve.ar.max_replicas=1", "serve.decoder.max_replicas=1", *settings).serve
    assert replicas_for_work(context(serving.most_running, target))[0] >= most
    assert serving.most_running >= 8
    ar, *others = bind_stages(small_config("serve.ar.max_replicas=1", *settings), "bundle")
    assert ar and ar._bound_deployment.max_ongoing_requests >= serving.most_running  # every video's plan is a call
    assert [each._bound_deployment.max_ongoing_requests for each in others if each] == [16, 4]
    assert small_config(*settings, "serve.max_running=3").serve.most_running == 3


def replicas() -> dict[str, int]:
    """Running ones of each deployment."""
    deployments = serve.status().applications[APP].deployments
    return {name: status.replica_states.get("RUNNING", 0) for name, status in deployments.items()}


def until(done: Callable[[dict[str, int]], bool], limit_s: float = 120) -> dict[str, int]:
    """The replicas, as soon as they are as they should be."""
    deadline = time.monotonic() + limit_s
    while not done(found := replicas()):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


@pytest.mark.ray
@pytest.mark.slow
def test_ar_and_dit_scale_apart_from_each_other(tmp_path: Path) -> None:
    each = ["target_ongoing_requests=1", "upscale_delay_s=1", "downscale_delay_s=3", "num_cpus=0.1", "max_replicas=2"]
    settings = [f"serve.{stage}.{setting}" for stage in ("ar", "dit") for setting in each]
    bundle = make_random_bundle(
        tmp_path / "bundle", f"serve.port={free_port()}", "serve.max_running=4", "serve.planned_ahead=2", *settings,
        "serve.decoder.max_replicas=1", "serve.decoder.num_cpus=0.1", "serve.decoder.downscale_delay_s=3",
        *(f"serve.{stage}.min_replicas=0" for stage in ("ar", "dit", "decoder")),
    )  # fmt: skip
    opened = load_bundle(bundle)
    config, data = opened.config, tmp_path / "data"
    with connect(config), serve_bundle(config, opened, data) as url, httpx.Client(base_url=url) as client:

        def ask(where: str, count: int, **body: object) -> list[str]:
            answers = [client.post(f"/v1/{where}", json={"prompt": "a", **body}) for _ in range(count)]
            assert {answer.status_code for answer in answers} == {200}
            return [answer.json()["id"] for answer in answers]

        until(lambda found: found[AR] == found[DIT] == found[DECODER] == 0)  # there is nothing to do
        drafts = ask("drafts", 4, num_segments=64)
        found = until(lambda found: found[AR] == 2)
        assert found[DIT] == 0
        for name in drafts:
            client.delete(f"/v1/drafts/{name}")
        videos = ask("videos", 4, num_segments=8, num_inference_steps=1000)
        until(lambda found: found[DIT] == 2)
        # plans that are far enough ahead are no work: the AR goes while the DiT has more than it can do
        assert until(lambda found: found[AR] == 0)[DIT] == 2
        for name in videos:
            client.delete(f"/v1/videos/{name}")
        until(lambda found: found[AR] == found[DIT] == found[DECODER] == 0)
        # and all come back for the next one
        (last,) = ask("videos", 1)
        assert "event: completed" in client.get(f"/v1/videos/{last}/events", timeout=120).text
