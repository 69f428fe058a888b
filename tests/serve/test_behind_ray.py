"""Guard, log lines and metrics in a replica of Ray Serve, behind its proxy."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from arlon_ray.config import ServeConfig, load_config
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.guard import Guard
from serve.logs import log_stage, set_up_logging
from serve.metrics import Metrics


@serve.deployment(name="Other")
class Other:
    """Stands for a stage: another process that works on what a request asked for."""

    def __init__(self) -> None:
        set_up_logging("json", "info")
        self.metrics = Metrics()

    def work(self, request_id: str) -> None:
        log_stage(request_id, "video_1", "dit", 2, 1.5)
        self.metrics.segment("dit", 1.5)


@serve.deployment(name="Front")
@serve.ingress()
class Front:
    """A guarded application."""

    def __init__(self, other: serve.handle.DeploymentHandle) -> None:
        set_up_logging("json", "info")
        self.other = other

    def __serve_build_asgi_app__(self) -> FastAPI:
        app, settings = FastAPI(), ServeConfig(max_upload_bytes=2**20)
        app.add_middleware(Guard, settings, None, Metrics(), echo_request_id=False)

        @app.post("/v1/videos")
        async def make() -> dict:
            await self.other.work.remote("mine-1")
            logging.getLogger("serve.front").info("asked")
            return {}

        @app.get("/v1/broken")
        async def broken() -> None:
            raise OSError("/secret/path")

        return app


@pytest.mark.ray
@pytest.mark.slow
def test_one_request_can_be_followed_through_the_deployments() -> None:
    port, structured = free_port(), LoggingConfig(encoding="JSON", enable_access_log=False)
    with connect(load_config("tiny")):
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=structured)
        try:
            serve.run(Front.bind(Other.bind()), logging_config=structured)  # type: ignore[attr-defined]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                made = client.post("/v1/videos", headers={"x-request-id": "mine-1"})
                assert made.status_code == 200 and made.headers.get_list("x-request-id") == ["mine-1"]
                assert len(client.get("/v1/nothing").headers.get_list("x-request-id")) == 1
                assert client.get("/v1/broken").json()["error"]["code"] == "internal_error"
                assert client.post("/v1/videos", content=b"x" * (2**20 + 1)).status_code == 413
                assert client.post("/v1/videos", headers={"host": "evil.test"}).status_code == 403
            check_lines()
            check_metrics()
        finally:
            serve.shutdown()


def check_lines() -> None:
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[attr-defined]
    lines = [json.loads(line) for file in logs.glob("replica_*.log") for line in file.read_text().splitlines()]
    mine = [line for line in lines if line.get("request_id") == "mine-1"]
    found = {(line["deployment"].split("_")[-1], line["message"].split(" ")[0]) for line in mine}
    assert {("Front", "asked"), ("Front", "POST"), ("Other", "request_id")} <= found, lines
    (stage,) = [line for line in mine if line.get("stage") == "dit"]
    assert (stage["segment"], stage["seconds"], stage["job"]) == (2, 1.5, "video_1")
    assert any("/secret/path" in str(line) for line in lines)


def check_metrics() -> None:
    (node,) = ray.nodes()
    place = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = (
        r'ray_arlon_serve_requests_total\{[^}]*deployment="Front"[^}]*route="/v1/videos"[^}]*status="200"',
        r'ray_arlon_serve_segment_seconds_count\{[^}]*deployment="Other"[^}]*stage="dit"',
    )
    for _ in range(40):  # Ray exports every few seconds
        exported = urllib.request.urlopen(place, timeout=10).read().decode()
        missing = [pattern for pattern in wanted if not re.search(pattern, exported)]
        if not missing:
            return
        time.sleep(1)
    raise AssertionError((missing, [line for line in exported.splitlines() if "arlon" in line]))
