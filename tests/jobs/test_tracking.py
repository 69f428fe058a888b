import numpy as np
import pytest

from arlon_ray.config import TrainingConfig, load_config
from jobs.tracking import Tracking, tracking_uri

TRAINING = TrainingConfig(steps=4)


@pytest.fixture
def config(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return load_config("tiny")


def only_run(root):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("arlon-ray").experiment_id])
    return client, run


def test_interrupted_run_goes_on_without_repeated_steps(config, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Tracking(config, tmp_path).stage("s", key="k", training=TRAINING, parents={}) as run,
    ):
        for step in (1, 2, 3):
            run.metrics(step, {"loss": 1.0 / step, "step_s": 0.1})
        raise KeyboardInterrupt
    assert only_run(tmp_path)[1].info.status == "KILLED"
    with Tracking(config, tmp_path).stage("s", key="k", training=TRAINING, parents={}) as run:
        for step in (2, 3, 4):
            run.metrics(step, {"loss": 1.0 / step, "step_s": 0.1})
        run.metrics(4, {"held_out/loss": 0.5})
        run.picture("p", np.zeros((4, 4, 3), np.uint8), 4)
    client, found = only_run(tmp_path)
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4]
    assert found.data.metrics["held_out/loss"] == 0.5
    assert found.data.params["dit.hidden_size"] == "128"
    assert "config.json" in [file.path for file in client.list_artifacts(found.info.run_id)]
    with (
        pytest.raises(RuntimeError),
        Tracking(config, tmp_path).stage("s", key="k", training=TRAINING, parents={}) as again,
    ):
        assert again.run_id != found.info.run_id
        raise RuntimeError


def test_server_that_is_down_is_announced_once_and_stops_nothing(tmp_path):
    config = load_config("tiny", ["tracking.uri=http://127.0.0.1:9"])
    announced = []
    with Tracking(config, tmp_path, announced.append).stage("s", key="k", training=TRAINING, parents={"a": "b"}) as run:
        run.metrics(1, {"loss": 1.0, "step_s": 0.1})
        run.picture("p", np.zeros((4, 4, 3), np.uint8), 1)
    assert len(announced) == 1
    assert "http://127.0.0.1:9" in announced[0] and "training goes on" in announced[0]


def test_where_it_is_kept(config, tmp_path, monkeypatch):
    assert tracking_uri(config, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri(config, tmp_path) == "http://server"
    assert tracking_uri(load_config("tiny", ["tracking.uri=http://named"]), tmp_path) == "http://named"
