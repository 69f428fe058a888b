"""deploy/airflow_dag.py: graph and commands are those of Argo, which the jobs take; Airflow reads it where it is."""

from __future__ import annotations

import ast
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import ray.job_submission
from ray.job_submission import JobStatus

from tests.deploy.manifests import DEPLOY, parsed
from tests.deploy.test_argo import TASKS, command

FILE = DEPLOY / "airflow_dag.py"


def stages() -> dict[str, tuple[list[str], str]]:
    """`STAGES` of the file, which cannot be imported without Airflow."""
    for node in ast.parse(FILE.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "STAGES":
            return ast.literal_eval(node.value)  # type: ignore[no-any-return]
    raise AssertionError("no STAGES")


STAGES = stages()


def as_run(text: str, root: str = "/mnt/arlon") -> str:
    """A command with the default parameters, or another root."""
    return text.replace("CONFIG", "small").replace("VIDEOS", "/mnt/arlon/videos").replace("ROOT", root)


def test_the_graph_is_the_one_of_argo() -> None:
    theirs = {name.replace("-", "_"): task.get("dependencies", []) for name, task in TASKS.items()}
    assert {name: before for name, (before, _) in STAGES.items()} == {
        name: [each.replace("-", "_") for each in before] for name, before in theirs.items()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_its_commands_are_the_ones_of_argo(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = vars(parsed(as_run(STAGES[stage][1]), monkeypatch))
    theirs = vars(parsed(command(stage.replace("_", "-")), monkeypatch))
    for name in ours:
        if name not in ("overrides", "resolved"):
            assert ours[name] == theirs[name], name


class Operator:
    """`airflow.sdk.BaseOperator`, as far as the file goes."""

    log = logging.getLogger("airflow.task")

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id

    def __rshift__(self, other: Operator) -> None:
        pass


@dataclass
class Cluster:
    """What `JobSubmissionClient()` gives: jobs of a cluster, new ones of which end at once."""

    exit_code: int = 0
    jobs: dict[str, Any] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[Any]:
        return list(self.jobs.values())

    def submit_job(self, *, submission_id: str, **others: Any) -> None:
        status = JobStatus.FAILED if self.exit_code else JobStatus.SUCCEEDED
        self.jobs[submission_id] = SimpleNamespace(
            submission_id=submission_id, status=status, driver_exit_code=self.exit_code, **others
        )

    def get_job_status(self, job: str) -> JobStatus:
        return self.jobs[job].status  # type: ignore[no-any-return]

    def get_job_info(self, job: str) -> Any:
        return self.jobs[job]

    def get_job_logs(self, job: str) -> str:
        return f"log of {job}"

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda: found)
    return found


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file, with something in Airflow's place."""
    sdk, exceptions = ModuleType("airflow.sdk"), ModuleType("airflow.sdk.exceptions")
    vars(sdk).update(DAG=MagicMock(), BaseOperator=Operator, Param=MagicMock())
    error = type("AirflowException", (Exception,), {})
    vars(exceptions).update(AirflowException=error, AirflowFailException=type("AirflowFailException", (error,), {}))
    for each in (ModuleType("airflow"), sdk, exceptions):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return SimpleNamespace(**runpy.run_path(str(FILE)))


def context(run: str = "run") -> dict[str, Any]:
    return {"ti": SimpleNamespace(dag_id="arlon", run_id=run, task_id="train_ar")}


def test_a_task_submits_its_job_and_ends_as_it_does(module: Any, cluster: Cluster) -> None:
    task = module.RayJob(task_id="train_ar", command=["python", "jobs/train_ar.py", "--output", "/mnt/my videos; ls"])
    task.execute(context())
    (job,) = cluster.jobs.values()
    assert job.entrypoint == "python jobs/train_ar.py --output '/mnt/my videos; ls'"
    assert job.metadata == {"dag": "arlon", "run": "run", "task": "train_ar"}
    task.execute(context())  # cleared: a job again, which finds what the first has made
    assert len(cluster.jobs) == 2
    for code, error in ((2, "AirflowFailException"), (1, "AirflowException"), (75, "AirflowException")):
        cluster.exit_code = code
        with pytest.raises(module.AirflowException, match=f"exit code {code}") as raised:
            task.execute(context())
        assert type(raised.value).__name__ == error


def test_a_task_goes_on_with_its_job_that_still_runs(
    module: Any, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that had begun it is lost: Airflow tries the task again, and the job holds its output."""
    about = {"dag": "arlon", "run": "run", "task": "train_ar"}
    job = SimpleNamespace(submission_id="begun", metadata=about, status=JobStatus.RUNNING, driver_exit_code=None)
    cluster.jobs["begun"] = job
    monkeypatch.setattr(time, "sleep", lambda _: setattr(job, "status", JobStatus.SUCCEEDED))
    task = module.RayJob(task_id="train_ar", command=["python"])
    task.execute(context())
    assert list(cluster.jobs) == ["begun"]
    task.on_kill()
    assert cluster.stopped == ["begun"]

    job.status = JobStatus.RUNNING
    task.execute(context("another"))
    assert len(cluster.jobs) == 2


AIRFLOW = shutil.which("airflow")
#: Reads the file as Airflow does, and fills in the templates.
READ = """
import json, sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
dag = bag.dags["arlon"]
context = {"params": {**dag.params.dump(), "root": "/mnt/my arlon"}}
found = {
    task.task_id: [task.render_template(task.command, context), sorted(task.upstream_task_ids), task.retries]
    for task in dag.tasks
}
print(json.dumps(found))
"""


@pytest.mark.skipif(not AIRFLOW, reason="needs Airflow 3: pip install apache-airflow, in a place of its own, on PATH")
def test_airflow_reads_it(tmp_path: Path) -> None:
    assert AIRFLOW
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    python = str(Path(AIRFLOW).resolve().with_name("python"))
    read = subprocess.run(
        [python, "-c", READ, str(FILE)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert read.returncode == 0, read.stdout + read.stderr
    found = json.loads(read.stdout.splitlines()[-1])
    assert list(found) == list(STAGES)
    for name, (before, text) in STAGES.items():
        words = [as_run(word, "/mnt/my arlon") for word in text.split()]
        assert found[name] == [words, sorted(before), 2]
