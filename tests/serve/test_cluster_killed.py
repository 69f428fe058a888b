"""The whole of it killed in the middle of a video, and started again: the video is what it would have been."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import psutil
import pytest

from jobs.serve_demo import free_port
from tests.bundles import make_random_bundle
from tests.postgres import postgres
from tests.s3 import s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
REQUEST = {"prompt": "a red ball rolls to the left", "num_segments": 10, "seed": 3, "num_inference_steps": 6}


class Service:
    """`python jobs/serve_bundle.py` as a process of its own."""

    def __init__(self, bundle: Path, folder: Path, settings: Sequence[str] = ()) -> None:
        port = free_port()
        command = [sys.executable, "jobs/serve_bundle.py", "--bundle", str(bundle), "--output", str(folder)]
        command += [part for setting in settings for part in ("--set", setting)]
        self.log = (folder.with_suffix(".log")).open("ab")
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=self.log, stderr=self.log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10)
        self.until(lambda: self.client.get("/healthz").status_code == 200)

    def until(self, done, limit_s: float = 150) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-2000:]
            try:
                if done():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(Path(self.log.name).read_text()[-2000:])

    def video(self, name: str) -> dict:
        return self.client.get(f"/v1/videos/{name}").json()

    def content(self, name: str) -> bytes:
        self.until(lambda: self.video(name)["status"] in ("completed", "failed"))
        assert self.video(name)["status"] == "completed", self.video(name)["error"]
        return self.client.get(f"/v1/videos/{name}/content").content

    def kill(self) -> None:
        """SIGKILL to the driver and everything of its Ray."""
        processes = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(20)
        psutil.wait_procs(processes, 20)


@pytest.fixture(params=["a folder", "PostgreSQL and a bucket"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    """Where jobs and files lie."""
    if request.param == "a folder":
        yield []
    else:
        with postgres(tmp_path / "server") as url, s3_server("videos") as options:
            yield [f"serve.database_url={url}", f"serve.data_dir=s3://videos/kept{options}"]


def test_every_accepted_video_is_finished(tmp_path: Path, settings: list[str]) -> None:
    bundle = make_random_bundle(tmp_path / "bundle", "dit.depth=6", "dit.hidden_size=64", "serve.max_running=1")
    first = Service(bundle, tmp_path / "data", settings)
    try:
        cut, waits = (first.client.post("/v1/videos", json=REQUEST).json()["id"] for _ in range(2))
        first.until(lambda: sum(s["status"] == "completed" for s in first.video(cut)["segments"]) >= 3)
    finally:
        first.kill()
    second = Service(bundle, tmp_path / "data", settings)
    try:
        contents = [second.content(name) for name in (cut, waits)]
        assert contents[0] == contents[1]  # the one that waited was made undisturbed
        assert [video["id"] for video in second.client.get("/v1/videos?order=asc").json()["data"]] == [cut, waits]
    finally:
        second.kill()
