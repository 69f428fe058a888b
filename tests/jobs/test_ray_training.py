"""Stages through Ray Train and DeepSpeed, with two real workers."""

import os
import re
import signal
import threading

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
def test_adamw_agrees_with_one_process_and_is_tracked(config, ray_here, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = Tracking(config, tmp_path)
    with tracking.pipeline("test", key="p"):
        artifact, recorder = distributed(config, tmp_path, ADAMW, tracking=tracking)
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
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert losses == {step: values["loss"] for step, values in recorder.values.items()}
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/square-000012.png"]


@pytest.mark.ray
@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_worker_with_muon_changes_nothing(config, ray_here, tmp_path, zero_stage):
    settings = {**MUON, "zero_stage": zero_stage}
    flag = tmp_path / "flag"
    found = distributed(config, tmp_path, settings, kill_at=7, flag=flag)
    assert flag.exists()
    assert "regression: going on after step 5 of 12" in found[1].lines
    assert_equal_training(found, alone(tmp_path, settings))


@pytest.mark.ray
def test_nan_ends_with_one_line_and_keeps_the_checkpoint(ray_here, tmp_path):
    config = load_config("tiny", ["cluster.num_workers=2", "cluster.max_failures=0"])
    with pytest.raises(TrainingError) as caught:
        distributed(config, tmp_path, ADAMW, break_at=7)
    assert "\n" not in str(caught.value)
    assert "step 7" in str(caught.value) and "the loss is nan" in str(caught.value) and "700" in str(caught.value)
    assert "checkpoint of step 5 is kept" in str(caught.value)
    with pytest.raises(InputError, match=r"other settings is under way there: learning_rate \(0.01 → 0.02\); go on"):
        distributed(config, tmp_path, {**ADAMW, "learning_rate": 0.02}, key="l" * 64)
    # with one worker instead of two, and nothing that ZeRO splits
    alone_there = load_config("tiny", ["cluster.num_workers=1"])
    artifact, recorder = distributed(alone_there, tmp_path, {**ADAMW, "zero_stage": 0})
    assert "regression: going on after step 5 of 12" in recorder.lines
    expected = alone(tmp_path, ADAMW)
    assert all(torch.allclose(artifact.tensors()[n], v, atol=2e-4) for n, v in expected[0].tensors().items())


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
def test_sigterm_stops_after_a_checkpoint_and_lost_storage_is_waited_for(config, ray_here, tmp_path):
    stopping = Disturbing(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    slow = {"seconds": 0.3}
    with pytest.raises(StoppedError, match=r"stopped after step [3-9] of 12, whose checkpoint is kept") as stop:
        distributed(config, tmp_path, ADAMW, recorder=stopping, **slow)
    done = int(re.search("after step ([0-9]+)", str(stop.value))[1])
    storage = storage_folder(tmp_path / "out")
    disturbed = Disturbing(done + 1, lambda: without_storage(storage, 4.0))
    artifact, recorder = distributed(config, tmp_path, ADAMW, recorder=disturbed, **slow)
    assert f"regression: going on after step {done} of 12" in recorder.lines
    assert sorted(step for step in recorder.values if "step_s" in recorder.values[step]) == list(range(done + 1, 13))
    assert "going on" not in "".join(recorder.lines[2:])
    recorder.values = {**stopping.values, **recorder.values}
    assert_equal_training((artifact, recorder), alone(tmp_path, ADAMW))


def test_uneven_batch_is_refused_before_ray(config, tmp_path):
    with pytest.raises(InputError, match=r"batch_size=7 cannot be split evenly over cluster.num_workers=2"):
        distributed(config, tmp_path, {**ADAMW, "batch_size": 7})
    assert list(tmp_path.iterdir()) == []
