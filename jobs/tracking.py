"""MLflow: one run per pipeline, a child run per stage. A store that fails never stops a training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from arlon_ray import __version__, mirror
from arlon_ray.artifact import Artifact, write_json
from arlon_ray.config import Config, TrainingConfig, flat
from arlon_ray.training.loop import StoppedError
from jobs.listening import GATES, gates_figure

RUNS_FILE = "mlflow_runs.json"
#: Alias of a model's newest version (MLflow keeps "latest" for itself).
NEWEST = "newest"
#: MLflow's own limits for one request and one value.
BATCH_METRICS, BATCH_PARAMS, VALUE_CHARACTERS = 1000, 100, 500
RETRY_AFTER_S = 60.0
MOST_WAITING = 100_000


def tracking_uri(config: Config, root: Path) -> str:
    """The configuration's URI, else MLFLOW_TRACKING_URI, else SQLite in `root` (absolute: jobs run anywhere)."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.absolute()}/mlflow.db"


class Tracking:
    """The tracking of one job. `root` is the output folder; `announce` says once what does not work."""

    def __init__(self, config: Config, root: Path, announce: Callable[[str], None] | None = None) -> None:
        self.config, self.root = config, mirror.aside(root.absolute())
        self.uri = tracking_uri(config, self.root)
        self.parent_run: str | None = None
        self._announce = announce or (lambda text: print(text, file=sys.stderr, flush=True))
        self._client: Any = None
        self._experiment: str | None = None
        self._retry_at = 0.0
        self._announced = False

    def attempt(self, action: Callable[[Any], Any]) -> tuple[bool, Any]:
        """(True, result of `action(client)`), or (False, None) while the store does not work."""
        if time.monotonic() < self._retry_at:
            return False, None
        try:
            return True, action(self._connected())
        # Whatever the store's fault is (network, disk, a locked database), training goes on.
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_AFTER_S
            if not self._announced:
                self._announced = True
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                self._announce(f"MLflow at {self.uri} does not work, training goes on without it: {reason}")
            return False, None

    @contextmanager
    def pipeline(self, name: str, *, key: str) -> Iterator[TrackedRun]:
        """A parent run; stages within the block are its children."""
        with self._run(name, key=key, tags={"pipeline": name}) as run:
            run.configuration(self.config)
            self.parent_run = run.run_id
            try:
                yield run
            finally:
                self.parent_run = None

    @contextmanager
    def stage(
        self, name: str, *, key: str, training: TrainingConfig, parents: Mapping[str, str]
    ) -> Iterator[TrackedRun]:
        """A run of one stage, with its settings and the fingerprints of what it was made from."""
        tags = {"stage": name, **{f"parent.{role}": value for role, value in parents.items()}}
        if self.parent_run:
            tags["mlflow.parentRunId"] = self.parent_run
        with self._run(name, key=key, tags=tags) as run:
            run.configuration(self.config, training=training)
            for role, fingerprint in parents.items():
                run.dataset(role, fingerprint)
            yield run

    @contextmanager
    def row(
        self, name: str, *, key: str, options: BaseModel, tags: Mapping[str, str], parents: Mapping[str, str]
    ) -> Iterator[TrackedRun]:
        """A run of one row of an evaluation: how it samples, and the fingerprints of the models that it measures."""
        tags = {**tags, **{f"parent.{role}": value for role, value in parents.items()}}
        with self._run(name, key=key, tags=tags) as run:
            run.configuration(self.config, options=options)
            yield run

    @contextmanager
    def _run(self, name: str, *, key: str, tags: Mapping[str, str]) -> Iterator[TrackedRun]:
        note = f"{name}-{key[:32]}"
        tags = {**tags, "key": key, "code_version": __version__, **_source_tags()}
        if self.config.tracking.tenant:
            tags["tenant"] = self.config.tracking.tenant
        _, run_id = self.attempt(lambda client: self._open(client, note, name, tags))
        run = TrackedRun(self, run_id)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, StoppedError):
            status = "KILLED"
            raise
        finally:
            run.flush()
            if run_id:
                self.attempt(lambda client: client.set_terminated(run_id, status))
            if status == "FINISHED":
                self._note_run(note, None)

    def _open(self, client: Any, note: str, name: str, tags: Mapping[str, str]) -> str:
        """The unfinished run of the same key, or a new one."""
        known = self._noted_runs().get(note, {})
        if known.get("uri") == self.uri:
            client.update_run(known["run_id"], status="RUNNING")
            for tag, value in tags.items():
                client.set_tag(known["run_id"], tag, value)
            return str(known["run_id"])
        run_id = client.create_run(self._experiment, run_name=name, tags=dict(tags)).info.run_id
        self._note_run(note, run_id)
        return str(run_id)

    def _noted_runs(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.root / RUNS_FILE).read_text()))
        except (OSError, ValueError):
            return {}

    def _note_run(self, note: str, run_id: str | None) -> None:
        runs = self._noted_runs()
        if run_id is None:
            runs.pop(note, None)
        else:
            runs[note] = {"run_id": run_id, "uri": self.uri}
        write_json(self.root / RUNS_FILE, runs)

    def _connected(self) -> Any:
        if self._client is None:
            self.root.mkdir(parents=True, exist_ok=True)
            _set_environment()
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=self.uri)
            name = self.config.tracking.experiment
            found = client.get_experiment_by_name(name)
            # Beside a database files go into the output folder; a server knows where its own go.
            served = self.uri.startswith(("http:", "https:", "databricks"))
            location = None if served else (self.root / "mlartifacts").as_uri()
            self._experiment = found.experiment_id if found else client.create_experiment(name, location)
            self._client = client
        return self._client


class TrackedRun:
    """One MLflow run, as a Reporter. While the store fails, figures wait and are sent when it works again."""

    def __init__(self, tracking: Tracking, run_id: str | None) -> None:
        self.tracking, self.run_id = tracking, run_id
        self._waiting: list[tuple[str, float, int, int]] = []
        self._last_step = self._last_tracked_step()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """See Reporter. Steps that a resumed run makes again are tracked already, and left out."""
        now = int(time.time() * 1000)
        training = "step_s" in values
        if training and step <= self._last_step:
            return
        if training:
            self._last_step = step
        self._waiting += [(name, float(value), now, step) for name, value in values.items()]
        del self._waiting[:-MOST_WAITING]
        self.flush()

    def picture(self, name: str, array: np.ndarray, step: int) -> None:
        """See Reporter."""
        self._do(lambda client: client.log_image(self.run_id, array, artifact_file=f"pictures/{name}-{step:06d}.png"))

    def file(self, path: Path) -> None:
        """A picture that is a file already."""
        self._do(lambda client: client.log_artifact(self.run_id, str(path), "pictures"))

    def checkpoint(self, step: int, folder: Path) -> None:
        """See Reporter. Checkpoints are large and short-lived; the artefact is what is tracked."""

    def line(self, text: str) -> None:
        """See Reporter. Lines are for the terminal."""

    def artifact(self, artifact: Artifact) -> None:
        """Note the finished artefact: its fingerprint, its place and its lineage."""
        tags = {"artifact.fingerprint": artifact.fingerprint, "artifact.path": str(artifact.path)}

        def log(client: Any) -> None:
            for name, value in tags.items():
                client.set_tag(self.run_id, name, value)
            client.log_artifact(self.run_id, str(artifact.path / "lineage.json"))

        self._do(log)
        self._do(self._picture_gates)
        if self.tracking.config.tracking.register_models:
            self._do(partial(self._register, artifact=artifact))
        self.metrics(self._last_step, {f"artifact/{name}": value for name, value in artifact.lineage.metrics.items()})

    def _picture_gates(self, client: Any) -> None:
        """How strongly each layer listens, where the run has such figures."""
        names = [name for name in client.get_run(self.run_id).data.metrics if name.startswith(GATES)]
        history = {name.removeprefix(GATES): client.get_metric_history(self.run_id, name) for name in names}
        if history:
            points = {name: [(point.step, point.value) for point in its] for name, its in history.items()}
            client.log_figure(self.run_id, gates_figure(points), "pictures/gates.png")

    def _register(self, client: Any, artifact: Artifact) -> None:
        """A version of the stage's model, once for each artefact."""
        run = client.get_run(self.run_id)
        name = f"{self.tracking.config.tracking.experiment}-{run.data.tags['stage']}"
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        known = client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        if any(version.tags.get("fingerprint") == artifact.fingerprint for version in known):
            return
        client.log_artifacts(self.run_id, str(artifact.path), "model")
        tags = {"fingerprint": artifact.fingerprint, "kind": artifact.lineage.kind}
        made = client.create_model_version(name, f"{run.info.artifact_uri}/model", self.run_id, tags=tags)
        client.set_registered_model_alias(name, NEWEST, made.version)

    def configuration(self, config: BaseModel, **sections: BaseModel) -> None:
        """All settings, as searchable parameters and as one file."""
        resolved = {**config.model_dump(mode="json"), **{k: s.model_dump(mode="json") for k, s in sections.items()}}
        texts = [(name, _as_text(value)) for name, value in flat(resolved)]

        def log(client: Any) -> None:
            from mlflow.entities import Param

            # a run that goes on keeps the parameters it began with: MLflow refuses to change one
            known = client.get_run(self.run_id).data.params
            new = [(name, value) for name, value in texts if name not in known]
            for start in range(0, len(new), BATCH_PARAMS):
                part = [Param(name, value[:VALUE_CHARACTERS]) for name, value in new[start : start + BATCH_PARAMS]]
                client.log_batch(self.run_id, params=part)
            client.log_dict(self.run_id, resolved, "config.json")

        self._do(log)

    def dataset(self, role: str, fingerprint: str) -> None:
        """An input of the run: a data set or an artefact of another stage."""

        def log(client: Any) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = json.dumps({"fingerprint": fingerprint})
            dataset = Dataset(name=role, digest=fingerprint[:36], source_type="local", source=source)
            client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", role)])])

        self._do(log)

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting and self.run_id:
            part = _entities(self._waiting[:BATCH_METRICS])
            if not self._do(partial(_log_metrics, run_id=self.run_id, metrics=part)):
                return
            del self._waiting[: len(part)]

    def _do(self, action: Callable[[Any], Any]) -> bool:
        return bool(self.run_id) and self.tracking.attempt(action)[0]

    def _last_tracked_step(self) -> int:
        if not self.run_id:
            return -1
        _, history = self.tracking.attempt(lambda client: client.get_metric_history(self.run_id, "step_s"))
        return max((metric.step for metric in history or ()), default=-1)


def _log_metrics(client: Any, *, run_id: str, metrics: list[Any]) -> None:
    client.log_batch(run_id, metrics=metrics)


def _entities(waiting: list[tuple[str, float, int, int]]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(name, value, timestamp, step) for name, value, timestamp, step in waiting]


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | bool) or value is None else str(value)


def _source_tags() -> dict[str, str]:
    """The script and, where the code lies in a repository, its commit."""
    tags = {"mlflow.source.name": Path(sys.argv[0]).name or "python", "mlflow.source.type": "JOB"}
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return tags
    return {**tags, "mlflow.source.git.commit": found.stdout.strip()}


def _set_environment() -> None:
    """No usage statistics, and no minutes of waiting for a server that is down."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Alembic's account of every table it makes.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
