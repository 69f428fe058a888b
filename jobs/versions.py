"""Whether the nodes of a cluster run the code that the driver runs. Python and Ray are compared by Ray itself."""

from __future__ import annotations

import hashlib
from pathlib import Path

import arlon_ray
from jobs.command_line import InputError

PACKAGES = ("arlon_ray", "data_pipeline", "jobs", "serve")
#: Seconds that all nodes have to say what they run.
PATIENCE_S = 120.0


def code_version() -> str:
    """The project's version and a hash of its source files: "0.1.0 (code 1a2b3c4d5e6f)"."""
    root, digest = Path(arlon_ray.__file__).parents[1], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return f"{arlon_ray.__version__} (code {digest.hexdigest()[:12]})"


def check_nodes() -> None:
    """Raises InputError that names a node of the cluster whose code is not the driver's.

    A node that does not answer in time is left to Ray: it may be on its way out. One that comes later is not asked.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(code_version)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[ask.options(scheduling_strategy=strategy).remote()] = node["NodeManagerAddress"]
    here = code_version()
    for answer in ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)[0]:
        try:
            there = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            raise InputError(f"node {asked[answer]}: cannot import this project: {error.cause}; {_ADVICE}") from None
        except ray.exceptions.RayError:  # the node is gone
            continue
        if there != here:
            raise InputError(f"node {asked[answer]} runs arlon-ray {there}, but this job is {here}; {_ADVICE}")


_ADVICE = "bring the code of all nodes to one version, or submit with --working-dir"
