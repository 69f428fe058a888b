import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch

from arlon_ray.artifact import load_artifact, save_artifact
from arlon_ray.config import TrainingConfig, load_config
from jobs import tracking
from jobs.tracking import Tracking, tracking_uri
from tests.postgres import postgres

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


def test_a_run_says_whose_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config("tiny", ["tracking.tenant=studio"])
    with Tracking(config, tmp_path).stage("s", key="k", training=TRAINING, parents={}):
        pass
    assert only_run(tmp_path)[1].data.tags["tenant"] == "studio"


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


def test_how_strongly_layers_listen_is_a_picture(config, tmp_path):
    artifact = save_artifact(tmp_path / "dit", kind="dit", config={}, tensors={"w": torch.ones(3)}, key="k")
    with Tracking(config, tmp_path).stage("dit", key="k", training=TRAINING, parents={}) as run:
        for step in (1, 20, 40):
            gates = {f"gates/{layer:02d}": 0.01 * step * layer for layer in range(3)}
            run.metrics(step, {"loss": 1.0 / step, "step_s": 0.1, **gates})
        run.artifact(artifact)
    client, found = only_run(tmp_path)
    picture = cv2.imread(client.download_artifacts(found.info.run_id, "pictures/gates.png"))
    # the last layer's bar is the longest: its row is bluest on the right
    blue = (np.abs(picture.astype(int) - (180, 119, 31)).max(-1) < 30)[:, picture.shape[1] * 2 // 3 :]
    rows = np.flatnonzero(blue.any(1))
    assert blue[rows[-1] - 5].sum() >= 1.9 * blue[rows[0] + 5].sum() > 0


def test_where_it_is_kept(config, tmp_path, monkeypatch):
    assert tracking_uri(config, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert tracking_uri(config, tmp_path) == "http://server"
    assert tracking_uri(load_config("tiny", ["tracking.uri=http://named"]), tmp_path) == "http://named"


@contextmanager
def mlflow_server(folder, port, store):
    """A real server, its files in `folder`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", f"{folder}/files"]
    with (folder / "log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def store_of(kind, folder):
    """URI of a real database in `folder`."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/server.db"
    else:
        with postgres(folder / "postgres") as uri:
            yield uri


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path):
    with store_of(request.param, tmp_path) as uri:
        yield uri


@pytest.mark.slow
def test_a_server_that_is_lost_gets_all_figures_when_it_is_back(tmp_path, monkeypatch, store):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "RETRY_AFTER_S", 0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, announced = f"http://127.0.0.1:{port}", []
    config = load_config("tiny", [f"tracking.uri={uri}"])
    artifact = save_artifact(
        tmp_path / "s", kind="ar", config={}, tensors={"w": torch.ones(3)}, metrics={"loss": 0.5}, key="k"
    )
    with mlflow_server(tmp_path, port, store):
        stage = Tracking(config, tmp_path, announced.append).stage(
            "s", key="k", training=TRAINING, parents={"data": "d" * 64}
        )
        run = stage.__enter__()
        run.metrics(1, {"loss": 1.0, "step_s": 0.1})
    for step in (2, 3):
        run.metrics(step, {"loss": 1.0 / step, "step_s": 0.1})
    assert len(announced) == 1
    with mlflow_server(tmp_path, port, store):
        time.sleep(1)
        run.metrics(4, {"loss": 0.25, "step_s": 0.1})
        run.artifact(artifact)
        run.artifact(artifact)
        stage.__exit__(None, None, None)
        client = MlflowClient(uri)
        (found,) = client.search_runs([client.get_experiment_by_name("arlon-ray").experiment_id])
        assert found.info.status == "FINISHED" and found.data.metrics["artifact/loss"] == 0.5
        assert [metric.step for metric in client.get_metric_history(found.info.run_id, "loss")] == [1, 2, 3, 4]
        assert found.inputs.dataset_inputs[0].dataset.digest == "d" * 36
        newest = client.get_model_version_by_alias("arlon-ray-s", "newest")
        assert (newest.version, newest.run_id) == ("1", found.info.run_id)
        copy = client.download_artifacts(found.info.run_id, "model", str(tmp_path))
        assert load_artifact(copy, "ar").fingerprint == artifact.fingerprint
