"""deploy/airflow_dag.py: graph and commands are those of Argo, which the jobs take; Airflow reads it where it is."""

from __future__ import annotations

import ast
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

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


def as_run(text: str) -> str:
    """A command with the default parameters."""
    return text.replace("CONFIG", "small").replace("VIDEOS", "/mnt/arlon/videos").replace("ROOT", "/mnt/arlon")


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


@pytest.fixture
def module() -> ModuleType:
    """The file as Airflow reads it."""
    pytest.importorskip("airflow.sdk", reason="Airflow is not installed: pip install apache-airflow, in its own place")
    spec = importlib.util.spec_from_file_location("airflow_dag", FILE)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules["airflow_dag"] = found
    spec.loader.exec_module(found)
    return found


def test_airflow_reads_it(module: Any) -> None:
    assert set(module.dag.task_ids) == set(STAGES)
    for name, (before, text) in STAGES.items():
        task = module.dag.get_task(name)
        assert task.upstream_task_ids == set(before) and task.retries == 2
        rendered = task.render_template(task.command, {"params": dict(module.dag.params.items())})
        assert rendered == as_run(text)
