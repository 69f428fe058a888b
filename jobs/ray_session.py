"""One Ray for a job: the cluster it was submitted to, or a local one that it starts and ends itself."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arlon_ray.config import Config
from arlon_ray.heap import heap_environment
from arlon_ray.training.loop import StoppedError
from jobs.versions import check_nodes

#: Ray Train's workers hold their CPUs while Ray Data or Serve need some: with fewer than this, one waits for the other
#: for ever. On a box with two cores they are logical: the threads share the cores.
LEAST_LOCAL_CPUS = 4
OBJECT_STORE_BYTES = 512 * 2**20

#: Passed on to workers from the driver's environment.
PASSED_ON = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")

#: What Ray says, of all its processes, where a node is not there in time.
NOT_STARTED = "timed out during startup"

#: Whether this process started the Ray that runs (see `is_own`).
_own = False


def path_with_interpreter() -> str:
    """PATH with this interpreter's folder in front: DeepSpeed compiles with the `ninja` that lies there."""
    folder = str(Path(sys.executable).parent)
    parts = os.environ.get("PATH", "").split(os.pathsep)
    return os.pathsep.join([folder, *(part for part in parts if part != folder)])


def worker_environment(config: Config) -> dict[str, str]:
    """Environment of the training workers."""
    threads = str(threads_per_worker(config))
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # Ray Train runs the training in a thread
    result = {**heap_environment(), **passed_on, "PATH": path_with_interpreter()}
    result |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # Only without GPUs: DeepSpeed would otherwise look for them on its own.
    return result if config.cluster.use_gpu else {**result, "DS_ACCELERATOR": "cpu"}


def threads_per_worker(config: Config) -> int:
    """Threads that one training worker computes with."""
    return max(1, math.floor(config.cluster.cpus_per_worker))


def local_cpus(config: Config) -> int:
    """Logical CPUs of a local Ray: what training asks for, and some for data and serving beside it."""
    needed = math.ceil(config.cluster.worker_counts[-1] * config.cluster.cpus_per_worker) + 1
    return max(LEAST_LOCAL_CPUS, os.cpu_count() or 1, needed)


def worker_resources(config: Config) -> dict[str, float]:
    """What Ray reserves for one training worker."""
    cluster = config.cluster
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})}


def lacking(config: Config) -> str:
    """What the fewest workers that may train need and all nodes together do not have, as text; else nothing."""
    import ray

    workers, there = config.cluster.worker_counts[0], ray.cluster_resources()
    needed = {what: workers * amount for what, amount in worker_resources(config).items()}
    return ", ".join(
        f"{n:g} {what} (there: {there.get(what, 0):g})" for what, n in needed.items() if n > there.get(what, 0)
    )


def is_own() -> bool:
    """Whether the Ray that runs is a local one of this process, to which no node will come."""
    return _own


@contextmanager
def connect(config: Config, *, dashboard: bool = False, worker_output: bool = False) -> Iterator[None]:
    """Within the block Ray is there. Ends only what it started.

    Under `ray job submit`, or with RAY_ADDRESS set, that cluster is used; an initialised Ray is used as it is (the
    pipeline keeps one for all stages). `worker_output` lets what workers print reach this terminal; progress does
    without it (see jobs/journal).
    """
    global _own
    _set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    same = {"namespace": config.tracking.tenant, "log_to_driver": worker_output, "logging_level": logging.WARNING}
    if os.environ.get("RAY_ADDRESS"):
        _start(address="auto", **same)
    else:
        _start(
            # Not an address of a cluster that some earlier command noted on this machine.
            address="local",
            num_cpus=local_cpus(config),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            configure_logging=True,
            **same,
        )
        _own = True
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own ends the process with another exit code
    try:
        if not _own:
            check_nodes()
        yield
    finally:
        _own = False
        ray.shutdown()


def _start(**options: Any) -> None:
    """Ray. Raises StoppedError where this machine is too busy for one of our own, or SIGTERM comes meanwhile."""
    import ray

    try:
        ray.init(**options)
    except SystemExit:  # Ray's own handler of SIGTERM, while it starts
        raise StoppedError("stopped while Ray started: run the same command again") from None
    except Exception as error:
        if NOT_STARTED not in str(error):
            raise
        raise StoppedError(
            "Ray did not start within its 30 seconds: this machine is too busy; run the same command again when it is "
            "less so"
        ) from None


def _set_environment() -> None:
    """What Ray reads from the environment when it is imported or started."""
    os.environ["PATH"] = path_with_interpreter()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # Relative paths of the configuration (weights/…) are relative to where the job was started.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # How often Ray Train's controller looks: for checkpoints to take in, for dead workers, for the end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # How often Serve's controller looks, ten times a second by itself: a tenth of a core of which a laptop has two.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # A local Ray's workers are not nicer than others by themselves (15): AR and decoder, which give way to the DiT,
    # could not be any nicer.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
