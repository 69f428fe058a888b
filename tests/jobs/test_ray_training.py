"""Stages through Ray Train and DeepSpeed, with two real workers."""

import pytest
import torch

from arlon_ray.artifact import load_artifact
from arlon_ray.config import TrainingConfig, load_config
from arlon_ray.training.engine import TorchEngine
from arlon_ray.training.loop import FolderCheckpoints, TrainingError, run_stage
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


def distributed(config, folder, settings, *, tracking=None, **stage):
    """Train with two workers; returns the artefact and what was reported."""
    recorder = Recorder()
    artifact = train_stage(
        "regression",
        regression_stage,
        {"training": settings, **SAME, **stage},
        config=config,
        training=TrainingConfig(**settings),
        output=folder / "out",
        key="k" * 64,
        tracking=tracking,
        parents={"dataset": "d" * 64},
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
    _, recorder = distributed(config, tmp_path, ADAMW)
    assert "regression: going on after step 5 of 12" in recorder.lines


def test_uneven_batch_is_refused_before_ray(config, tmp_path):
    with pytest.raises(InputError, match=r"batch_size=7 cannot be split evenly over cluster.num_workers=2"):
        distributed(config, tmp_path, {**ADAMW, "batch_size": 7})
    assert list(tmp_path.iterdir()) == []
