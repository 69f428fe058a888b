"""Training a stage on Ray Train with DeepSpeed: the driver's side and the workers' side."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from arlon_ray import mirror
from arlon_ray.artifact import Artifact, load_artifact, write_json
from arlon_ray.config import Config, TrainingConfig
from arlon_ray.training.checkpoints import KEPT_CHECKPOINTS
from arlon_ray.training.engine import Stage
from arlon_ray.training.loop import Reporter, StoppedError, TrainingError, run_stage
from arlon_ray.training.reporting import ConsoleReporter
from data_pipeline.manifest import differences
from jobs.command_line import InputError
from jobs.holding import alone
from jobs.journal import FailureNote, JournalReader, JournalReporter
from jobs.ray_checkpoints import RayCheckpoints, RayWatch, stop_file, storage_is_back
from jobs.ray_metrics import RayMetrics
from jobs.ray_session import (
    connect,
    is_own,
    lacking,
    threads_per_worker,
    worker_environment,
    worker_resources,
)
from jobs.tracking import Tracking

StageFactory = Callable[..., Stage]
SETTINGS_FILE = "settings.json"
#: Times that Ray Train's controller is started again in one job.
CONTROLLER_RESTARTS = 5


def check_workers(name: str, training: TrainingConfig, config: Config) -> None:
    """Raises InputError if the batch cannot be split over the workers, whatever their number."""
    shared = training.sequence_parallel
    if shared > 1 and not name.startswith("dit"):
        raise InputError(
            f"{name}: training.sequence_parallel={shared}: only the DiT's frames can be shared; set it to 1"
        )
    for workers in config.cluster.worker_counts:
        if workers % shared:
            raise InputError(
                f"{name}: training.sequence_parallel={shared} does not divide cluster.num_workers={workers}; "
                f"choose a multiple of {shared} workers"
            )
        parts = workers // shared * training.accumulation
        if training.batch_size % parts:
            more = [("training.sequence_parallel", shared, "÷"), ("training.accumulation", training.accumulation, "×")]
            terms = "".join(f" {sign} {setting}={value}" for setting, value, sign in more if value > 1)
            raise InputError(
                f"{name}: training.batch_size={training.batch_size} cannot be split evenly over "
                f"cluster.num_workers={workers}{terms}; choose a multiple of {parts}"
            )


def train_stage(
    name: str,
    stage_factory: StageFactory,
    arguments: Mapping[str, Any],
    *,
    config: Config,
    training: TrainingConfig,
    output: Path,
    key: str,
    tracking: Tracking | None = None,
    parents: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    reporters: Sequence[Reporter] | None = None,
    flops: float = 0.0,
    keep_checkpoints: bool = False,
) -> Artifact:
    """Train the stage that every worker builds by `stage_factory(**arguments)`; its artefact goes to `output`.

    `arguments` are small and picklable: paths and settings, no data. A run of the same `key` goes on from its last
    checkpoint. `parents` (role → fingerprint) are for the tracking; `settings`, flat, are what `key` stands for;
    `flops`, of a step over all workers, are for figures. Raises InputError before Ray starts, TrainingError (one line)
    when training ends in an error, StoppedError after SIGTERM, BusyError while another job makes `output`.
    """
    check_workers(name, training, config)
    output = output.absolute()
    with alone(config, output.parent, output.name):
        folder = storage_folder(output) / f"{name}-{key[:16]}"
        _refuse_other_settings(folder, settings or {}, output)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS_FILE, dict(settings or {}))
        run = tracking.stage(name, key=key, training=training, parents=parents or {}) if tracking else nullcontext()
        with run as tracked, connect(config):
            console = [ConsoleReporter(name, training.steps)] if reporters is None else list(reporters)
            reader = JournalReader(folder, [*console, *([tracked] if tracked else []), RayMetrics(name)])
            _check_resources(name, config, reader)
            task = {
                "stage_factory": stage_factory,
                "arguments": dict(arguments),
                "output": str(output),
                "folder": str(folder),
                "key": key,
                "attempt": uuid.uuid4().hex,
                "threads": threads_per_worker(config),
                "flops": flops,
            }
            _fit(name, task, config, reader)
            assert reader.artifact_kind is not None, "rank 0 ended without an artefact"
            artifact = load_artifact(output, reader.artifact_kind)
            if tracked:
                tracked.artifact(artifact)
        if not keep_checkpoints:
            mirror.remove(storage_folder(output))
        return artifact


def _check_resources(name: str, config: Config, reader: JournalReader) -> None:
    """Ray waits without a word for what is not there. Raises InputError where it cannot come."""
    if not (lacks := lacking(config)):
        return
    if is_own():
        raise InputError(
            f"{name}: the workers need {lacks}; set cluster.num_workers, cluster.cpus_per_worker or cluster.use_gpu to "
            "what this machine has, or submit the job to a cluster"
        )
    reader.line(f"{name}: waiting for a node: the workers need {lacks}")


def _refuse_other_settings(folder: Path, settings: Mapping[str, Any], output: Path) -> None:
    """Raises InputError if a training with other settings, of which there is a checkpoint, is to become `output`."""
    for other in mirror.glob(folder.parent, "*"):
        if other != folder and mirror.glob(other, "step-*"):
            note = other / SETTINGS_FILE
            theirs = json.loads(mirror.read(note)) if mirror.exists(note) else {}
            raise InputError(
                f"{output}: a training with other settings is under way there: {differences(theirs, dict(settings))}; "
                f"go on with those, choose another --output, or remove {folder.parent}"
            )


def storage_folder(output: Path) -> Path:
    """Where checkpoints lie until the artefact `output` is there."""
    return output.parent / f".{output.name}.training"


def _fit(name: str, task: dict[str, Any], config: Config, reader: JournalReader) -> None:
    """Train to the end. Ray Train starts workers anew; its controller, which dies with the storage, is started here."""
    folder = Path(task["folder"])
    restarts = 0
    while error := _fit_once(name, task, config, reader):
        if type(error).__name__ != "ControllerError" or restarts == CONTROLLER_RESTARTS or not storage_is_back(folder):
            break
        restarts += 1
        reader.line(f"{name}: {_in_one_line(error)}; the storage works again, going on from the last checkpoint")
    if reader.stopped:
        raise StoppedError(reader.stopped)
    if error is None:
        return
    log = folder / "error.log"
    with suppress(OSError):
        log.write_text(str(error))
        mirror.push(log)
    noted = FailureNote(folder, task["attempt"]).read()
    raise TrainingError(noted or f"{name}: {_in_one_line(error)}; details: {log}") from None


def _fit_once(name: str, task: dict[str, Any], config: Config, reader: JournalReader) -> BaseException | None:
    """Run Ray Train to its end or its error, which is returned. Ctrl-C ends it as it ends any program.

    The workers then end with the Ray session; a checkpoint counts only once it is whole.
    """
    import ray

    trainer, controllers = _trainer(task, config), list[Any]()
    # instead of Ray Train's own handler, which ends the process with exit code 0
    trainer._register_sigint_handler = controllers.append
    # Ray is asked from this thread alone: `ray.shutdown` under another that waits for it ends in a segmentation fault
    with _stopping_on_sigterm(name, stop_file(Path(task["folder"]), task["attempt"]), reader), reader.following():
        try:
            trainer.fit()
        except KeyboardInterrupt:
            for controller in controllers:
                ray.kill(controller)
            raise
        except Exception as error:
            return error
    return None


@contextmanager
def _stopping_on_sigterm(name: str, file: Path, reader: JournalReader) -> Iterator[None]:
    """Within the block SIGTERM asks the workers for a checkpoint and an end (schedulers send it before SIGKILL).

    Raises StoppedError where there is no worker yet that could hear it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    too_early = False

    def stop(*_: object) -> None:
        nonlocal too_early
        write_json(file, {})
        if not reader.heard:
            too_early = True
            raise KeyboardInterrupt  # no other error gets through Ray's waiting

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if not too_early:
            raise
        raise StoppedError(f"{name}: stopped before it began; the same command begins again") from None
    finally:
        signal.signal(signal.SIGTERM, before)
        mirror.remove(file)


def _in_one_line(error: BaseException) -> str:
    """The first worker's error, or Ray's own."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank = min(failures)
        cause = getattr(failures[rank], "cause", None) or failures[rank]
        lines = str(cause).strip().splitlines() or [""]
        return f"worker {rank}: {type(cause).__name__}: {lines[-1]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _trainer(task: dict[str, Any], config: Config) -> Any:
    import ray.train
    from ray.train.torch import TorchTrainer

    cluster, folder = config.cluster, Path(task["folder"])
    files, place = mirror.filesystem(folder.parent)
    workers = (cluster.num_workers, cluster.max_workers) if cluster.max_workers else cluster.num_workers
    return TorchTrainer(
        train_worker,
        train_loop_config=task,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # mypy sees the class of Ray Train v1, which is not elastic
            use_gpu=cluster.use_gpu,
            resources_per_worker=worker_resources(config),
        ),
        # mypy sees the class of Ray Train v1 behind this name
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=folder.name,
            storage_path=place,
            storage_filesystem=files,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            worker_runtime_env={"env_vars": worker_environment(config)},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def train_worker(task: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    import ray.train
    import ray.train.torch
    import torch

    from jobs.deepspeed_engine import DeepSpeedEngine

    torch.set_num_threads(task["threads"])
    folder = Path(task["folder"])
    note, reporter = FailureNote(folder, task["attempt"]), JournalReporter(folder)
    if (known := note.read()) is not None:
        raise TrainingError(known)
    stage: Stage = task["stage_factory"](**task["arguments"])
    engine = DeepSpeedEngine(stage, ray.train.torch.get_device())
    checkpoints = RayCheckpoints(folder, task["key"])
    watch = RayWatch(stop_file(folder, task["attempt"]), engine, stage.training.log_every)
    try:
        result = run_stage(
            stage,
            engine,
            reporter,
            output=Path(task["output"]),
            checkpoints=checkpoints,
            key=task["key"],
            watch=watch,
            flops=task["flops"],
        )
    except StoppedError as stopped:
        checkpoints.settle()
        if not engine.rank:
            reporter.stopped(str(stopped))
        return
    except TrainingError as error:
        note.write(error)
        checkpoints.settle()
        raise
    if result.artifact:
        mirror.forget(folder)
        reporter.done(result.artifact.lineage.kind)
