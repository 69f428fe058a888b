"""One of two nodes dies in mid-training: with other workers, or fewer, the job goes on from its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from arlon_ray.config import TrainingConfig, load_config
from jobs.ray_session import connect
from jobs.ray_training import train_stage
from tests.jobs.test_ray_training import ADAMW, SAME, Disturbing, alone
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
    with connect(config):
        artifact = train_stage(
            "regression",
            regression_stage,
            {"training": settings, **SAME, "seconds": 0.3},
            config=config,
            training=TrainingConfig(**settings),
            output=tmp_path / "out",
            key="k" * 64,
            reporters=[disturbed],
        )
    again = [int(line.split("after step ")[1].split()[0]) for line in disturbed.lines if "going on after step" in line]
    assert again and again[0] >= 10, disturbed.lines
    expected, _ = alone(tmp_path, settings)
    for name, value in expected.tensors().items():
        assert name == "seen" or torch.allclose(artifact.tensors()[name], value, atol=2e-4), name
