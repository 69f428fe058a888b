"""`ray job submit` of a real job to a real local cluster, with token authentication on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource

from arlon_ray.config import load_config
from data_pipeline.manifest import DatasetManifest, read_manifest
from data_pipeline.synthetic import write_samples
from jobs.ray_session import path_with_interpreter
from jobs.serve_demo import free_port

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")
RAYS_OWN = ("_AutoscalingCoordinatorActor", "_StatsActor", "ActorLocationTracker")


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
    environment["RAY_JOB_STOP_WAIT_TIME_S"] = "60"  # time for a last checkpoint
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


@dataclass(frozen=True)
class Jobs:
    """`ray job` on a cluster."""

    address: str
    environment: dict[str, str]

    def ray(self, *words: str) -> str:
        """What a command prints; it may fail."""
        command = [RAY, "job", *words[:1], "--address", self.address, *words[1:]]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120
        ).stdout

    def submit(self, name: str, *command: str) -> None:
        """As a platform team does it: a name, metadata, resources of the driver; it runs on by itself."""
        ended = submit_when_ready(
            [RAY, "job", "submit", "--address", self.address, "--submission-id", name, "--working-dir", ".",
             "--no-wait", "--entrypoint-num-cpus", "0.5", "--metadata-json", '{"team": "video"}', "--", *command],
            self.environment,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def state(self, name: str) -> JobStatus:
        """Of a job."""
        return self._client.get_job_status(name)

    def ended(self, name: str, limit_s: float = 120) -> tuple[JobDetails, str]:
        """What is known of a job as soon as it has ended, and its log."""
        deadline = time.monotonic() + limit_s
        while not self.state(name).is_terminal():
            assert time.monotonic() < deadline, self.ray("logs", name)
            time.sleep(0.5)
        return self._client.get_job_info(name), self._client.get_job_logs(name)

    def left_over(self) -> list[str]:
        """Actors and placement groups that are there."""
        state = StateApiClient(address=self.address)
        found = [
            *state.list(StateResource.ACTORS, ListApiOptions(filters=[("state", "!=", "DEAD")]), True),
            *state.list(StateResource.PLACEMENT_GROUPS, ListApiOptions(filters=[("state", "!=", "REMOVED")]), True),
        ]
        # Ray's own, which stay as long as the cluster: who may have how much of it, and what its datasets did
        return [str(each) for each in found if getattr(each, "class_name", "") not in RAYS_OWN]

    @property
    def _client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)


@pytest.mark.slow
def test_a_pipeline_submitted_twice_runs_once_and_a_stop_cleans_up(
    cluster: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(*cluster)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    write_samples(tmp_path / "videos", 12, 0, load_config("tiny").video, (2,))
    output = tmp_path / "run"
    settings = [
        "vqvae.fine.training.steps=100000",
        "vqvae.fine.training.batch_size=4",
        "vqvae.fine.training.held_out=2",
    ]
    command = ["python", "jobs/pipeline.py", "--input", str(tmp_path / "videos"), "--output", str(output)]
    command += [word for each in settings for word in ("--set", each)]
    jobs.submit("first", *command)
    deadline = time.monotonic() + 240
    while "vqvae_fine:" not in (log := jobs.ray("logs", "first")):
        assert time.monotonic() < deadline and not jobs.state("first").is_terminal(), log
        time.sleep(2)

    jobs.submit("second", *command)
    info, log = jobs.ended("second")
    assert "job first on" in log and "ray job logs -f first" in log and "Traceback" not in log
    assert info.driver_exit_code == os.EX_TEMPFAIL and info.metadata is not None and info.metadata["team"] == "video"
    assert jobs.state("first") == JobStatus.RUNNING

    jobs.ray("stop", "first")
    info, log = jobs.ended("first")
    assert info.status == JobStatus.STOPPED, log
    deadline = time.monotonic() + 30
    while (left := jobs.left_over()) and time.monotonic() < deadline:
        time.sleep(1)
    assert not left, left
    partial = [str(path) for path in output.rglob("*") if ".partial" in path.name or path.suffix == ".old"]
    assert partial == [] and not (output / "codec_fine").exists()
    assert [path.name for path in output.glob(".*.job-*")]
    for file in output.rglob(".*.job-*"):
        assert json.loads(file.read_text())["ended"], file

    # and again: it goes on behind the checkpoint that the stop has left
    jobs.submit("third", *command)
    deadline = time.monotonic() + 240
    while "going on after step" not in (log := jobs.ray("logs", "third")):
        assert time.monotonic() < deadline and not jobs.state("third").is_terminal(), log
        time.sleep(2)
    jobs.ray("stop", "third")
    jobs.ended("third")
