"""deploy/argo-workflow.yaml: its graph, and the commands that it submits. Argo's own schema is not at hand."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
from ray.dashboard.modules.job.cli import submit

from tests.deploy.manifests import DEPLOY, KUBERAY, containers, documents, parsed, ray_manifests

(WORKFLOW,) = documents(DEPLOY / "argo-workflow.yaml")
TEMPLATES = {template["name"]: template for template in WORKFLOW["spec"]["templates"]}
TASKS: dict[str, dict[str, Any]] = {task["name"]: task for task in TEMPLATES["stages"]["dag"]["tasks"]}


def filled(text: str, **more: str) -> str:
    """`text` with the workflow's own parameters, and `more`, in place of {{…}}. Raises KeyError for others."""
    given = WORKFLOW["spec"]["arguments"]["parameters"]
    values = {f"workflow.parameters.{each['name']}": each["value"] for each in given} | more
    return re.sub(r"\{\{(.+?)\}\}", lambda found: values[found[1]], text)


def command(task: str) -> str:
    """The command of a task."""
    (parameter,) = TASKS[task]["arguments"]["parameters"]
    assert parameter["name"] == "command"
    return filled(parameter["value"])


def script(submitted: str) -> str:
    """What the shell of a task runs."""
    (text,) = TEMPLATES["job"]["container"]["args"]
    names = {"pod.name": "arlon-x-job-1", "workflow.name": "arlon-x", "inputs.parameters.command": submitted}
    return filled(text, **names)


def test_the_graph_has_no_loose_ends() -> None:
    assert WORKFLOW["spec"]["entrypoint"] == "stages"
    done: set[str] = set()
    for name, task in TASKS.items():  # they stand in an order in which they can run
        assert set(task.get("dependencies", [])) <= done, name
        assert task["template"] in TEMPLATES
        done.add(name)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_commands_that_the_job_takes(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(command(task), monkeypatch)
    assert arguments.resolved.name == "small"
    manifest = ray_manifests()[task.replace("-", "_")]
    alone = parsed(manifest["spec"]["entrypoint"], monkeypatch)
    for name, value in vars(alone).items():
        if name not in ("overrides", "resolved"):
            assert getattr(arguments, name) == value, f"as in kuberay/: --{name}"


@pytest.mark.parametrize("task", TASKS)
def test_a_stage_waits_for_what_it_reads(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(name: str) -> set[str]:
        needed = TASKS[name].get("dependencies", [])
        return {*needed, *(other for each in needed for other in before(each))}

    arguments = vars(parsed(command(task), monkeypatch))
    read = [value for name, value in arguments.items() if name != "output" and isinstance(value, str)]
    outputs = {name: parsed(command(name), monkeypatch).output for name in TASKS if name != task}
    for name, output in outputs.items():
        if any(value == output or value.startswith(output + "/") for value in read):
            assert name in before(task), f"{task} reads what {name} writes"


def test_it_submits_as_ray_takes_it() -> None:
    assert subprocess.run(["bash", "-n", "-c", script(command("train-dit"))]).returncode == 0
    (line,) = [line for line in script(command("train-dit")).splitlines() if line.startswith("ray job submit")]
    assert line.endswith(" &")
    context = submit.make_context("submit", shlex.split(line.removesuffix(" &"))[3:])
    assert " ".join(context.params["entrypoint"]) == " ".join(shlex.split(command("train-dit")))
    assert context.params["submission_id"] == "arlon-x-job-1"
    assert context.params["entrypoint_num_cpus"] == 1


def test_it_goes_to_the_cluster_with_its_token_and_image() -> None:
    (cluster,) = documents(KUBERAY / "cluster.yaml")
    name = cluster["metadata"]["name"]
    assert f"RAY_ADDRESS=http://{name}-head-svc:8265" in script("")
    (container,) = containers(TEMPLATES["job"])
    mode, token = container["env"]
    assert mode == {"name": "RAY_AUTH_MODE", "value": "token"}
    assert token["valueFrom"]["secretKeyRef"] == {"name": name, "key": "auth_token"}
    assert container["image"] == next(containers(cluster))["image"]


@pytest.mark.parametrize(("ended", "status", "code"), [(0, "succeeded", 0), (0, "was stopped", 1), (1, "failed", 1)])
def test_a_task_ends_as_its_job_did(ended: int, status: str, code: int) -> None:
    """The script itself, with a `ray` that says what a cluster would."""
    ray = f'ray() {{ if [ "$2" = submit ]; then return {ended}; else echo "Job \'x\' {status}"; fi; }}\n'
    assert subprocess.run(["bash", "-c", ray + script("python x.py")], timeout=20).returncode == code


def test_a_task_that_is_stopped_stops_its_job() -> None:
    ray = 'ray() { if [ "$2" = submit ]; then sleep 5; else echo "$*"; fi; }\n'
    process = subprocess.Popen(["bash", "-c", ray + "(sleep 0.5; kill $$) &\n" + script("python x.py")],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "job stop arlon-x-job-1\n"
    assert process.wait(timeout=10) == 143
