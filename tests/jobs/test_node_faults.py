"""One of two nodes dies in mid-training: with other workers, or fewer, the job goes on from its last checkpoint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from arlon_ray.artifact import Artifact
from arlon_ray.config import Config, TrainingConfig, load_config
from arlon_ray.training.loop import Reporter
from jobs.ray_session import connect
from jobs.ray_training import train_stage
from tests.jobs.test_ray_training import ADAMW, SAME, Disturbing, alone
from tests.training.recording import Recorder
from tests.training.regression_stage import regression_stage

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head and two more nodes of one CPU each: real raylets on this machine."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    yield nodes
    nodes.shutdown()


@pytest.mark.parametrize("most", [None, 2], ids=["another node takes over", "elastic: one worker is enough"])
def test_a_node_that_dies_costs_one_interval(cluster, tmp_path, most) -> None:
    lost = cluster.add_node(num_cpus=1)
    if most is None:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    workers = "cluster.num_workers=2" if most is None else f"cluster.num_workers=1,cluster.max_workers={most}"
    config = load_config("tiny", [*workers.split(","), "cluster.max_failures=2"])
    settings = {**ADAMW, "steps": 40, "checkpoint_every": 5, "schedule": "constant"}
    disturbed = Disturbing(13, lambda: cluster.remove_node(lost, allow_graceful=False))
    artifact = train(config, settings, tmp_path, disturbed)
    assert_went_on(disturbed, 10, artifact, settings, tmp_path)


def test_a_node_that_will_be_taken_away_costs_no_step_that_was_logged(cluster, tmp_path) -> None:
    """Ray hears that a node goes, as from a cloud's notice: a checkpoint, though none is due for long."""
    lost = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    config = load_config("tiny", ["cluster.num_workers=2", "cluster.max_failures=2"])
    settings = {**ADAMW, "steps": 120, "log_every": 2, "checkpoint_every": 1000, "schedule": "constant"}
    words = [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "spot",
        "--deadline-remaining-seconds",
        "10",
    ]

    def notice() -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
        subprocess.run([*command, "--node-id", lost.node_id, *words], check=True, capture_output=True)

    disturbed = Disturbing(14, notice)
    artifact = train(config, settings, tmp_path, disturbed)
    assert disturbed.checkpoints[0] >= 14
    assert_went_on(disturbed, disturbed.checkpoints[0], artifact, settings, tmp_path)


def train(config: Config, settings: dict[str, Any], folder: Path, reporter: Reporter) -> Artifact:
    """On the cluster, at 0.3 seconds a step."""
    with connect(config):
        return train_stage(
            "regression",
            regression_stage,
            {"training": settings, **SAME, "seconds": 0.3},
            config=config,
            training=TrainingConfig(**settings),
            output=folder / "out",
            key="k" * 64,
            reporters=[reporter],
        )


def assert_went_on(reporter: Recorder, step: int, artifact: Artifact, settings: dict[str, Any], folder: Path) -> None:
    """From that step or later, to what training alone comes to."""
    again = [int(line.split("after step ")[1].split()[0]) for line in reporter.lines if "going on after step" in line]
    assert again and again[0] >= step, reporter.lines
    expected, _ = alone(folder, settings)
    for name, value in expected.tensors().items():
        assert name == "seen" or torch.allclose(artifact.tensors()[name], value, atol=2e-4), name
