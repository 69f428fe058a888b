"""Training a stage on Ray Train with DeepSpeed: the driver's side and the workers' side."""

from __future__ import annotations

import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from arlon_ray.artifact import Artifact, load_artifact
from arlon_ray.config import Config, TrainingConfig
from arlon_ray.training.engine import Stage
from arlon_ray.training.loop import KEPT_CHECKPOINTS, Reporter, TrainingError, read_progress, run_stage
from arlon_ray.training.reporting import ConsoleReporter
from jobs.command_line import InputError
from jobs.journal import FailureNote, JournalReader, JournalReporter
from jobs.ray_session import connect, threads_per_worker, worker_environment
from jobs.tracking import Tracking

StageFactory = Callable[..., Stage]


def check_workers(name: str, training: TrainingConfig, config: Config) -> None:
    """Raises InputError if the batch cannot be split over the workers."""
    workers = config.cluster.num_workers
    if training.batch_size % workers:
        raise InputError(
            f"{name}: training.batch_size={training.batch_size} cannot be split evenly over "
            f"cluster.num_workers={workers}; choose a multiple of {workers}"
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
    reporters: Sequence[Reporter] | None = None,
    keep_checkpoints: bool = False,
) -> Artifact:
    """Train the stage that every worker builds by `stage_factory(**arguments)`; its artefact goes to `output`.

    `arguments` are small and picklable: paths and settings, no data. A run of the same `key` goes on from its last
    checkpoint. `parents` (role → fingerprint) are for the tracking. Raises InputError before Ray starts, and
    TrainingError (one line) when training ends in an error.
    """
    check_workers(name, training, config)
    output = output.absolute()
    folder = storage_folder(output) / f"{name}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    run = tracking.stage(name, key=key, training=training, parents=parents or {}) if tracking else nullcontext()
    with run as tracked, connect(config):
        console = [ConsoleReporter(name, training.steps)] if reporters is None else list(reporters)
        reader = JournalReader(folder, [*console, *([tracked] if tracked else [])])
        task = {
            "stage_factory": stage_factory,
            "arguments": dict(arguments),
            "output": str(output),
            "folder": str(folder),
            "key": key,
            "attempt": uuid.uuid4().hex,
            "threads": threads_per_worker(config),
        }
        _fit(name, task, config, reader)
        assert reader.artifact_kind is not None, "rank 0 ended without an artefact"
        artifact = load_artifact(output, reader.artifact_kind)
        if tracked:
            tracked.artifact(artifact)
    if not keep_checkpoints:
        shutil.rmtree(storage_folder(output), ignore_errors=True)
    return artifact


def storage_folder(output: Path) -> Path:
    """Where checkpoints lie until the artefact `output` is there."""
    return output.parent / f".{output.name}.training"


def _fit(name: str, task: dict[str, Any], config: Config, reader: JournalReader) -> None:
    """Run Ray Train in a thread, so that this one can follow the journal and take Ctrl-C as any program does.

    (In the main thread Ray Train installs a handler of its own, which ends with exit code 0.) After Ctrl-C the
    workers end with the Ray session; a checkpoint counts only once it is whole.
    """
    trainer = _trainer(task, config)
    ended, errors = threading.Event(), []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=fit, name=f"train-{name}", daemon=True).start()
    reader.follow(ended)
    if errors:
        log = Path(task["folder"]) / "error.log"
        log.write_text(str(errors[0]))
        noted = FailureNote(Path(task["folder"]), task["attempt"]).read()
        raise TrainingError(noted or f"{name}: {_in_one_line(errors[0])}; details: {log}") from None


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
    return TorchTrainer(
        train_worker,
        train_loop_config=task,
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        # mypy sees the class of Ray Train v1 behind this name
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=folder.name,
            storage_path=str(folder.parent),
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
    try:
        result = run_stage(
            stage,
            engine,
            reporter,
            output=Path(task["output"]),
            checkpoints=RayCheckpoints(folder, task["key"], engine.rank),
            key=task["key"],
        )
    except TrainingError as error:
        note.write(error)
        raise
    if result.artifact:
        reporter.done(result.artifact.lineage.kind)


class RayCheckpoints:
    """Checkpoints through Ray Train: every rank's files are put together, and the newest two are kept."""

    def __init__(self, folder: Path, key: str, rank: int) -> None:
        self.folder, self.key, self.rank = folder, key, rank

    def newest_first(self) -> Iterator[Path]:
        """See Checkpoints. Ray Train gives the newest one only."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as path:
                if read_progress(Path(path)).get("key") == self.key:
                    yield Path(path)

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float]) -> Path:
        """See Checkpoints. A barrier: all ranks report the same step."""
        import ray.train

        name = f"step-{step:08d}"
        with tempfile.TemporaryDirectory(prefix="arlon-checkpoint-") as partial:
            fill(Path(partial))
            checkpoint = ray.train.Checkpoint.from_directory(partial)
            ray.train.report({"step": step, **values}, checkpoint=checkpoint, checkpoint_dir_name=name)
        return self.folder / name
