"""One job at a time on one output: real processes, killed ones among them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arlon_ray import mirror
from jobs import holding as module
from jobs.holding import BusyError, holding

ROOT = Path(__file__).resolve().parents[2]
#: Holds, says so, and waits to be killed, or for a line.
HOLDER = """
import sys
from pathlib import Path
from jobs.holding import holding
with holding(Path(sys.argv[1]), "pipeline"):
    print("holds", flush=True)
    sys.stdin.readline()
"""
#: Comes again and again; whoever is in must be in alone.
CONTENDER = """
import os, sys, time
from pathlib import Path
from jobs.holding import BusyError, holding
folder, came = Path(sys.argv[1]), 0
while came < 6:
    try:
        with holding(folder, "pipeline"):
            inside = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            time.sleep(0.002)
            os.close(inside)
            os.unlink(folder / "inside")
        came += 1
    except BusyError:
        time.sleep(0.001)
"""


def started(program: str, folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """A process that runs it."""
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), *more], cwd=ROOT, env={**os.environ, **environment},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def holder(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """One that holds."""
    process = started(HOLDER, folder, **environment)
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    return process


def files(folder: Path) -> list[Path]:
    """What lies there."""
    return sorted(folder.glob(".*.job-*"))


def test_only_one_is_in_however_many_come(tmp_path: Path) -> None:
    processes = [started(CONTENDER, tmp_path) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (left,) = files(tmp_path)
    assert left.name == ".pipeline.job-000018" and json.loads(left.read_text())["ended"]


def test_the_second_is_told_who_is_there_and_other_names_are_free(tmp_path: Path) -> None:
    submitted = json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}})
    first = holder(tmp_path, RAY_JOB_CONFIG_JSON_ENV_VAR=submitted)
    with pytest.raises(BusyError, match=r"job raysubmit_1 on .* since .* `ray job logs -f raysubmit_1`"):
        holding(tmp_path, "pipeline").__enter__()
    with holding(tmp_path, "tokens"):
        pass
    first.communicate("\n", timeout=20)
    with holding(tmp_path, "pipeline"), pytest.raises(BusyError, match=f"process {os.getpid()} on"):
        holding(tmp_path, "pipeline").__enter__()


def test_one_that_was_killed_here_is_followed_at_once(tmp_path: Path) -> None:
    first = holder(tmp_path)
    first.kill()  # and nobody asks for its exit code: it stays as a zombie
    time.sleep(0.2)
    begin = time.monotonic()
    with holding(tmp_path, "pipeline"):
        assert time.monotonic() - begin < 2
    first.wait()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holders of this machine look like those of another, and time is short."""
    monkeypatch.setattr(module, "_lives", lambda holder: None)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "GONE_S", 1.0)


@pytest.mark.usefixtures("elsewhere")
def test_one_of_another_machine_is_watched_for_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holding(tmp_path, "pipeline"), pytest.raises(BusyError):
        holding(tmp_path, "pipeline").__enter__()
    begin = time.monotonic()
    with holding(tmp_path, "pipeline"):  # it has said that it went
        assert time.monotonic() - begin < 0.5
    first = holder(tmp_path)
    first.kill()
    first.wait()
    capsys.readouterr()
    with holding(tmp_path, "pipeline"):
        assert time.monotonic() - begin > 0.9
        assert f"process {first.pid} on" in capsys.readouterr().out
    (tmp_path / ".pipeline.job-000099").touch()  # died before it had written
    with holding(tmp_path, "pipeline"):
        assert [path.name for path in files(tmp_path)] == [".pipeline.job-000100"]


@pytest.mark.usefixtures("elsewhere")
def test_one_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    """A machine that stood still, and finds another at its work."""
    asked, before = threading.Event(), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        with holding(tmp_path, "pipeline"):
            (tmp_path / ".pipeline.job-000002").write_text("{}")
            assert asked.wait(5)
        assert not json.loads((tmp_path / ".pipeline.job-000001").read_text()).get("ended")
        assert (tmp_path / ".pipeline.job-000002").read_text() == "{}"
    finally:
        signal.signal(signal.SIGTERM, before)


#: Claims an output in a bucket among the jobs of a cluster, says so, and waits to be killed, or for a line.
CLAIMANT = """
import sys, ray
from pathlib import Path
from arlon_ray import mirror
from jobs.holding import BusyError, claimed
ray.init(address=sys.argv[2], namespace=sys.argv[3], log_to_driver=False)
try:
    with claimed(mirror.origin(Path(sys.argv[1])), "pipeline"):
        print("holds", flush=True)
        sys.stdin.readline()
except BusyError as busy:
    print(busy, flush=True)
"""


@pytest.mark.ray
def test_in_a_bucket_one_job_of_a_cluster_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    where = "s3://bucket/run"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address

        def claimant(node: str) -> subprocess.Popen[str]:
            """A job on a node with a mirror of its own."""
            monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / node))
            return started(CLAIMANT, mirror.local(where), address, node)

        for end in ("told", "killed"):
            first = claimant("one")
            assert first.stdout is not None and first.stdout.readline() == "holds\n"
            second, _ = claimant("two").communicate(timeout=60)
            assert re.match(rf"s3://bucket/run: process {first.pid} on .* is at work here since", second)
            if end == "told":
                first.communicate("\n", timeout=60)
            else:
                first.kill()
                first.wait()
                time.sleep(2)  # Ray ends what a driver leaves
        third = claimant("two")
        assert third.stdout is not None and third.stdout.readline() == "holds\n"
        third.communicate("\n", timeout=60)
    finally:
        ray.shutdown()
