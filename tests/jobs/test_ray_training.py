"""Stages through Ray Train and DeepSpeed, with two real workers."""

import os
import re
import signal
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from arlon_ray.artifact import load_artifact
from arlon_ray.config import TrainingConfig, load_config
from arlon_ray.training.checkpoints import FolderCheckpoints
from arlon_ray.training.engine import TorchEngine
from arlon_ray.training.loop import StoppedError, TrainingError, run_stage
from jobs.command_line import InputError
from jobs.ray_session import connect
from jobs.ray_training import storage_folder, train_stage
from jobs.stage_runs import StagePlan, check_figure
from jobs.tracking import Tracking
from tests.training.recording import Recorder
from tests.training.regression_stage import regression_stage

ADAMW = {
    "steps": 12, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 3, "log_every": 1, "checkpoint_every": 5,
    "ema_decay": 0.9, "weight_decay": 0.01, "zero_stage": 1, "clip_norm": 0.5,
}  # fmt: skip
MUON = {**ADAMW, "optimizer": "muon", "clip_norm": 0.05}
#: Dropout and noise differ between one process and two; the rest must not.
SAME = {"dropout": 0.0, "noise": 0.0}


@pytest.fixture(scope="module")
def config():
    return load_config("tiny", ["cluster.num_workers=2", "cluster.max_failures=1"])


@pytest.fixture(scope="module")
def ray_here(config):
    with connect(config):
        yield


def distributed(config, folder, settings, *, tracking=None, recorder=None, key="k" * 64, **stage):
    """Train with two workers; returns the artefact and what was reported."""
    recorder = recorder or Recorder()
    artifact = train_stage(
        "regression",
        regression_stage,
        {"training": settings, **SAME, **stage},
        config=config,
        training=TrainingConfig(**settings),
        output=folder / "out",
        key=key,
        tracking=tracking,
        parents={"dataset": "d" * 64},
        settings={"learning_rate": settings["learning_rate"]},
        reporters=[recorder],
    )
    return artifact, recorder


def alone(folder, settings):
    """Train on the same batches in one process."""
    recorder, stage = Recorder(), regression_stage(settings, **SAME)
    checkpoints = FolderCheckpoints(folder / "alone-checkpoints")
    result = run_stage(stage, TorchEngine(stage), recorder, output=folder / "alone", checkpoints=checkpoints)
    return result.artifact, recorder


def assert_equal_training(found, expected):
    (artifact, recorder), (artifact_alone, recorder_alone) = found, expected
    assert recorder.values.keys() == recorder_alone.values.keys()
    for step, values in recorder_alone.values.items():
        assert recorder.values[step]["loss"] == pytest.approx(values["loss"], rel=2e-4), step
        assert recorder.values[step]["grad_norm"] == pytest.approx(values["grad_norm"], rel=2e-3), step
    ours, theirs = artifact.tensors(), artifact_alone.tensors()
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], atol=2e-4), name


@pytest.mark.ray
def test_a_killed_worker_changes_nothing_and_all_of_it_is_tracked(config, ray_here, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking, flag = Tracking(config, tmp_path), tmp_path / "flag"
    with tracking.pipeline("test", key="p"):
        artifact, recorder = distributed(config, tmp_path, ADAMW, tracking=tracking, kill_at=7, flag=flag)
    assert flag.exists() and "regression: going on after step 5 of 12" in recorder.lines
    assert_equal_training((artifact, recorder), alone(tmp_path, ADAMW))
    assert load_artifact(tmp_path / "out", "regression").lineage.key == "k" * 64
    assert not storage_folder(tmp_path / "out").exists()
    assert recorder.pictures["square"].shape == (8, 8, 3)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("arlon-ray").experiment_id])
    }
    run, parent = runs["regression"], runs["test"]
    assert run.info.status == parent.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.data.tags["artifact.fingerprint"] == artifact.fingerprint
    assert run.data.params["training.learning_rate"] == "0.01"
    # every step once, also those that were made again
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(steps) == list(range(1, 13))
    assert {"time/forward_s", "time/backward_s", "time/optimizer_s", "data_wait"} <= run.data.metrics.keys()
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/square-000012.png"]
    _check_metrics()
    newest = client.get_model_version_by_alias("arlon-ray-regression", "newest")
    assert (newest.run_id, newest.tags["fingerprint"]) == (run.info.run_id, artifact.fingerprint)
    assert load_artifact(client.download_artifacts(run.info.run_id, "model"), "regression").tensors().keys()


def _check_metrics():
    """What the dashboard shows is there for Prometheus."""
    import ray

    board = (Path(__file__).parents[2] / "docs" / "grafana" / "training.json").read_text()
    shown = set(re.findall(r"ray_arlon_train_\w+", board)) - {"ray_arlon_train_gates_"}
    assert len(shown) >= 9
    (node,) = ray.nodes()
    place = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(30):  # Ray exports every few seconds
        exported = urllib.request.urlopen(place, timeout=10).read().decode()
        missing = {name for name in shown if f"{name}{{" not in exported}
        if not missing:
            break
        time.sleep(1)
    assert not missing


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_killed_worker_with_muon_changes_nothing(config, ray_here, tmp_path, zero_stage):
    settings = {**MUON, "zero_stage": zero_stage}
    found = distributed(config, tmp_path, settings, kill_at=7, flag=tmp_path / "flag")
    assert "regression: going on after step 5 of 12" in found[1].lines
    assert_equal_training(found, alone(tmp_path, settings))


def test_a_figure_that_the_stage_does_not_measure_is_refused():
    training = TrainingConfig(keep_best="psnr", evaluate_every=5)
    plan = StagePlan("ar", "ar", regression_stage, {}, training, {}, {})
    with pytest.raises(InputError, match=r"ar: training\.keep_best=psnr: expected one of accuracy, loss, perplexity"):
        check_figure(plan)


class Disturbing(Recorder):
    """Does something once, in the driver's main thread, when it hears of a step."""

    def __init__(self, step, action):
        super().__init__()
        self.step, self.action = step, action

    def metrics(self, step, values):
        super().metrics(step, values)
        if step >= self.step and self.action:
            action, self.action = self.action, None
            action()


def without_storage(folder, seconds):
    """The storage is gone for a while."""
    hidden = folder.with_name("hidden")
    folder.rename(hidden)
    threading.Timer(seconds, hidden.rename, [folder]).start()


@pytest.mark.ray
def test_stopped_broken_and_ended_with_one_worker(config, ray_here, tmp_path):
    stopping = Disturbing(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match=r"stopped after step [2-6] of 12, whose checkpoint is kept") as stop:
        distributed(config, tmp_path, ADAMW, recorder=stopping, seconds=0.5)
    done = int(re.search("after step ([0-9]+)", str(stop.value))[1])

    once = load_config("tiny", ["cluster.num_workers=2", "cluster.max_failures=0"])
    going_on = Recorder()
    with pytest.raises(TrainingError) as caught:
        distributed(once, tmp_path, ADAMW, recorder=going_on, break_at=8)
    assert f"regression: going on after step {done} of 12" in going_on.lines
    kept = max(5, done)
    text = str(caught.value)
    assert "\n" not in text and "step 8" in text and "the loss is nan" in text and "800" in text
    assert f"checkpoint of step {kept} is kept" in text

    with pytest.raises(InputError, match=r"other settings is under way there: learning_rate \(0.01 → 0.02\); go on"):
        distributed(config, tmp_path, {**ADAMW, "learning_rate": 0.02}, key="l" * 64)

    # with one worker instead of two, and nothing that ZeRO splits
    alone_there = load_config("tiny", ["cluster.num_workers=1"])
    artifact, last = distributed(alone_there, tmp_path, {**ADAMW, "zero_stage": 0})
    assert f"regression: going on after step {kept} of 12" in last.lines
    last.values = {**stopping.values, **going_on.values, **last.values}
    assert_equal_training((artifact, last), alone(tmp_path, ADAMW))


@pytest.mark.ray
@pytest.mark.slow
def test_lost_storage_is_waited_for(config, ray_here, tmp_path):
    storage = storage_folder(tmp_path / "out")
    disturbed = Disturbing(3, lambda: without_storage(storage, 4.0))
    artifact, recorder = distributed(config, tmp_path, ADAMW, recorder=disturbed, seconds=0.3)
    assert list(recorder.values) == list(range(1, 13))
    assert_equal_training((artifact, recorder), alone(tmp_path, ADAMW))


@pytest.mark.parametrize(
    ("training", "cluster", "message"),
    [
        (
            {"batch_size": 7},
            {},
            "batch_size=7 cannot be split evenly over cluster.num_workers=2; choose a multiple of 2",
        ),
        ({"accumulation": 3}, {}, "cluster.num_workers=2 × training.accumulation=3; choose a multiple of 6"),
        ({}, {"max_workers": 3}, "batch_size=8 cannot be split evenly over cluster.num_workers=3"),
        ({"sequence_parallel": 2}, {}, "only the DiT's frames can be shared"),
    ],
)
def test_what_cannot_be_split_is_refused_before_ray(config, tmp_path, training, cluster, message):
    there = config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})
    with pytest.raises(InputError, match=re.escape(message)):
        distributed(there, tmp_path, {**ADAMW, **training})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def greedy(config):
    """Asks for GPUs, of which there are none."""
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"use_gpu": True})})


@pytest.mark.ray
def test_workers_that_this_machine_cannot_have_are_refused_at_once(ray_here, greedy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the workers need 2 GPU \(there: 0\); set cluster"):
        distributed(greedy, tmp_path, ADAMW)


@pytest.mark.ray
def test_on_a_cluster_they_are_waited_for_until_somebody_stops_it(ray_here, greedy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("jobs.ray_training.is_own", lambda: False)
    recorder, begin = Recorder(), time.monotonic()
    threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StoppedError, match="stopped before it began"):
        distributed(greedy, tmp_path, ADAMW, recorder=recorder)
    assert time.monotonic() - begin < 40
    assert recorder.lines == ["regression: waiting for a node: the workers need 2 GPU (there: 0)"]
