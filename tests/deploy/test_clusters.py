"""Every file for `ray up`, as Ray's own launcher reads it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import DEPLOY, ROOT, SHARED

CLOUD = {"cluster": ROOT / "cluster.yaml", "aws": DEPLOY / "aws.yaml", "gcp": DEPLOY / "gcp.yaml"}
ALL = {**CLOUD, "on-premises": DEPLOY / "on-premises.yaml"}


def prepared(path: Path) -> dict[str, Any]:
    """As `ray up` has it before it asks the cloud. Raises ValidationError."""
    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
def test_ray_accepts_it(path: Path) -> None:
    config = prepared(path)
    assert config["head_node_type"] in config["available_node_types"]


def test_ray_refuses_what_is_wrong(tmp_path: Path) -> None:
    """The check can fail: a misspelt key, and a pool without resources."""
    text = (ROOT / "cluster.yaml").read_text()
    for wrong in (text.replace("setup_commands:", "set_up_commands:"), text.replace("    resources: {CPU: 16}\n", "")):
        (tmp_path / "cluster.yaml").write_text(wrong)
        with pytest.raises(jsonschema.ValidationError):
            prepared(tmp_path / "cluster.yaml")


@pytest.mark.parametrize("path", CLOUD.values(), ids=CLOUD.keys())
def test_a_head_without_work_and_pools_for_all_kinds_of_it(path: Path) -> None:
    config = prepared(path)
    pools = dict(config["available_node_types"])
    head = pools.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert any("GPU" not in pool["resources"] for pool in pools.values())
    assert any(pool["resources"].get("GPU") for pool in pools.values())
    spot = [name for name, pool in pools.items() if re.search("spot|preemptible", str(pool["node_config"]))]
    assert spot and all(name.endswith("_spot") for name in spot)
    assert all(pool["resources"]["CPU"] and pool["max_workers"] for pool in pools.values())


@pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
def test_nodes_get_the_code_the_token_and_the_pinned_versions(path: Path) -> None:
    config = prepared(path)
    (target,) = [remote for remote, local in config["file_mounts"].items() if local == "."]
    assert target == f"/home/{config['auth']['ssh_user']}/arlon-ray"
    assert (ROOT / "constraints.txt").is_file()
    assert any(remote.endswith("/.ray/auth_token") for remote in config["file_mounts"])
    assert {".git", ".venv", "runs"} <= set(config["rsync_exclude"])
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("-c ~/arlon-ray/constraints.txt -e ~/arlon-ray" in command for command in commands)
    head, worker = (config[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))
    assert "--head --num-cpus=0" in head and "--address=$RAY_HEAD_IP:6379" in worker
    assert all("RAY_JOB_STOP_WAIT_TIME_S=120" in command for command in (head, worker))
    assert all("RAY_AUTH_MODE=token" in command and "cd ~/arlon-ray" in command for command in (head, worker))


@pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
def test_commands_are_shell(path: Path) -> None:
    config = prepared(path)
    commands = [each for name, value in config.items() if name.endswith("_commands") for each in value]
    assert len(commands) > 8
    checked = subprocess.run(["bash", "-n", "-c", "\n".join(commands)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", ["aws", "gcp", "on-premises"])
def test_clusters_for_more_than_a_try_mount_the_shared_folder(name: str) -> None:
    assert any(f"mount -t nfs4 -o nfsvers=4.1,hard NFS_HOST:/ {SHARED}" in command
               for command in prepared(ALL[name])["worker_setup_commands"])  # fmt: skip
