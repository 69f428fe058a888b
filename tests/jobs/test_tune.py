"""The search for settings: spaces that are none are refused; two real trials, each an MLflow run under the search's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from arlon_ray.artifact import load_artifact
from arlon_ray.config import load_config
from data_pipeline.synthetic import write_samples
from jobs.command_line import InputError
from jobs.preprocess import run_preprocess
from jobs.ray_session import connect
from jobs.tune import RESULTS, read_space, search
from tests.bundles import SMALL, save_random_vae

SPACE = {"vqvae.fine.training.learning_rate": {"grid_search": [0.001, 0.01]}, "vqvae.fine.width": {"choice": [16]}}
QUICK = ["vqvae.fine.training.steps=4", "vqvae.fine.training.batch_size=4", "vqvae.fine.training.held_out=2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines such as"),
        ("[1, 2]", "expected lines such as"),
        ("a: [", "cannot be read"),
        ("dit.training.learning_rate: 0.1", "expected one of choice, uniform"),
        ("dit.training.learning_rate: {normal: [0, 1]}", "expected one of choice, uniform"),
        ("dit.training.learning_rate: {uniform: 0.1}", "uniform: expected a list"),
        ("dit.training.learning_rate: {uniform: [0.1]}", "uniform: "),
        ("dit.training.speed: {choice: [1]}", "dit.training.speed"),
        ("dit.training.steps: {choice: [fast]}", "dit.training.steps"),
    ],
)
def test_a_space_that_is_none_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=f"--space {path}: ") as error:
        read_space(path, load_config("tiny"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.ray
@pytest.mark.slow
def test_trials_are_trained_tracked_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config("tiny", [*SMALL, *QUICK, "cluster.num_workers=1"])
    vae = save_random_vae(tmp_path / "vae", config.vae)
    write_samples(tmp_path / "in", 12, 0, config.video, (2,))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    space = read_space(tmp_path / "space.yaml", config)
    paths, output = {"dataset": tmp_path / "dataset", "vae": vae.path}, tmp_path / "out"
    output.mkdir()
    with connect(config):
        run_preprocess(config, str(tmp_path / "in"), paths["dataset"], vae=vae.path)
        arguments = {"trials": 1, "at_once": 1, "metric": "loss", "early": False}
        found = search(config, "vqvae_fine", space, paths, output, **arguments)
        again = search(config, "vqvae_fine", space, paths, output, **arguments)
    assert [row["value"] for row in found] == sorted(row["value"] for row in found) and len(found) == 2
    assert again == found == json.loads((output / RESULTS).read_text())["trials"]
    assert {row["settings"]["vqvae.fine.training.learning_rate"] for row in found} == {0.001, 0.01}
    for row in found:
        assert load_artifact(row["artifact"], "codec").lineage.metrics["loss"] == row["value"]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("arlon-ray").experiment_id])
    parents = [run.info.run_id for run in runs if run.data.tags.get("pipeline") == "tune vqvae_fine"]
    children = [run for run in runs if run.data.tags.get("stage") == "vqvae_fine"]
    assert len(children) == 2 and {run.data.tags["mlflow.parentRunId"] for run in children} <= set(parents)
