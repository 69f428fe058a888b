"""`ray job submit` of a real job to a real local cluster, with token authentication on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from arlon_ray.config import load_config
from data_pipeline.manifest import DatasetManifest, read_manifest
from data_pipeline.synthetic import write_samples
from jobs.ray_session import path_with_interpreter
from jobs.serve_demo import free_port

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")


def submit_when_ready(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submit a job; on a busy machine the head answers before its agent is there to take one."""
    deadline = time.monotonic() + 60
    while True:
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if "No available agent" not in ended.stdout + ended.stderr or time.monotonic() > deadline:
            return ended
        time.sleep(2)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A head node in a process group of its own, so that ending it touches no other Ray."""
    # also the agent's, whose default another Ray on this machine may hold: no job could be submitted then
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = path_with_interpreter()  # what a job calls `python`
    environment.pop("RAY_ADDRESS", None)
    head = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
         f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", "--disable-usage-stats",
         "--object-store-memory=200000000"],
        env=environment, stdout=(tmp_path / "head.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            listed = subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True)
            if listed.returncode == 0:
                break
            time.sleep(1)
        else:
            raise AssertionError((tmp_path / "head.log").read_text())
        yield address, environment
    finally:
        # asked to end, a node waits half a minute for its workers
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with suppress(psutil.NoSuchProcess):  # one ends when another does
                process.kill()
        head.wait(timeout=60)


def test_a_submitted_job_does_what_it_does_alone(cluster: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, environment = cluster
    write_samples(tmp_path / "videos", 6, 0, load_config("tiny").video, (2,))
    output = tmp_path / "dataset"
    submitted = submit_when_ready(
        [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--",
         "python", "jobs/preprocess.py", "--input", str(tmp_path / "videos"), "--output", str(output)],
        environment,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout + submitted.stderr
    assert read_manifest(output, DatasetManifest).rows == 6

    refused = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--",
         "python", "jobs/preprocess.py", "--input", str(tmp_path / "nothing"), "--output", str(output)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "not found" in refused.stdout + refused.stderr
    denied = subprocess.run(
        [RAY, "job", "list", "--address", address],
        env={**environment, "RAY_AUTH_TOKEN": "0" * 64}, capture_output=True, text=True,
    )  # fmt: skip
    assert denied.returncode != 0
