"""Airflow: the stages as a graph, each submitted to a Ray cluster. Needs `ray[default]` beside Airflow 3, and the
cluster's RAY_ADDRESS (http://HEAD:8265) and RAY_AUTH_TOKEN (with RAY_AUTH_MODE=token) in the workers' environment.

A job ends with 0 (done), 2 (bad input: not tried again), 75 (stopped, or its output is busy) or 1 (tried again: it goes
on where it was). A stage whose result is there ends at once, so a run may be cleared and started again.
"""

from __future__ import annotations

import shlex
import time
import uuid
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, BaseOperator, Param
from airflow.sdk.exceptions import AirflowException, AirflowFailException

#: Each stage: what it waits for, and its command.
STAGES = {
    "train_vae": ([], "python jobs/train_vae.py --config CONFIG --input VIDEOS --output ROOT/vae"),
    "preprocess": (
        ["train_vae"],
        "python jobs/preprocess.py --config CONFIG --input VIDEOS --vae ROOT/vae/vae --output ROOT/dataset",
    ),
    "train_vqvae": (
        ["preprocess"],
        "python jobs/train_vqvae.py --config CONFIG --dataset ROOT/dataset --vae ROOT/vae/vae --output ROOT/vqvae",
    ),
    "extract_tokens": (
        ["train_vqvae"],
        "python jobs/extract_tokens.py --config CONFIG --dataset ROOT/dataset --codec-fine ROOT/vqvae/codec_fine "
        "--codec-coarse ROOT/vqvae/codec_coarse --output ROOT/dataset/tokens",
    ),
    "train_ar": (
        ["extract_tokens"],
        "python jobs/train_ar.py --config CONFIG --dataset ROOT/dataset --codec-fine ROOT/vqvae/codec_fine "
        "--vae ROOT/vae/vae --output ROOT/ar",
    ),
    "train_dit": (
        ["extract_tokens"],
        "python jobs/train_dit.py --config CONFIG --dataset ROOT/dataset --codec-fine ROOT/vqvae/codec_fine "
        "--codec-coarse ROOT/vqvae/codec_coarse --vae ROOT/vae/vae --output ROOT/dit",
    ),
    "make_bundle": (
        ["train_ar", "train_dit"],
        "python jobs/make_bundle.py --config CONFIG --vae ROOT/vae/vae --codec-fine ROOT/vqvae/codec_fine "
        "--codec-coarse ROOT/vqvae/codec_coarse --ar ROOT/ar/ar --dit ROOT/dit/dit --output ROOT/bundle",
    ),
}
BAD_INPUT = 2


class RayJob(BaseOperator):
    """One job, from its submission to its end. A task that is stopped stops its job; one whose worker is lost, or that
    is tried again, goes on with the job that it began, if that still runs.
    """

    template_fields = ("command",)

    def __init__(self, *, command: list[str], **others: Any) -> None:
        super().__init__(**others)
        self.command = command
        self.job = ""

    def execute(self, context: Any) -> None:
        from ray.job_submission import JobSubmissionClient

        client, task = JobSubmissionClient(), context["ti"]
        about = {"dag": task.dag_id, "run": task.run_id, "task": task.task_id}
        running = [each for each in client.list_jobs() if each.metadata == about and not each.status.is_terminal()]
        if running:
            self.job = running[0].submission_id
        else:
            self.job = f"{task.task_id}-{uuid.uuid4().hex[:12]}"
            entrypoint = shlex.join(self.command)
            client.submit_job(entrypoint=entrypoint, submission_id=self.job, entrypoint_num_cpus=1, metadata=about)
        self.log.info("ray job logs -f %s", self.job)
        while not (status := client.get_job_status(self.job)).is_terminal():
            time.sleep(10)
        self.log.info("%s", client.get_job_logs(self.job)[-20_000:])
        info = client.get_job_info(self.job)
        if status.value == "SUCCEEDED":
            return
        end = f"{self.job}: {status.value.lower()}, exit code {info.driver_exit_code}"
        raise (AirflowFailException if info.driver_exit_code == BAD_INPUT else AirflowException)(end)

    def on_kill(self) -> None:
        from ray.job_submission import JobSubmissionClient

        if self.job:
            JobSubmissionClient().stop_job(self.job)


def filled(command: str) -> list[str]:
    """A command's words with the run's parameters, as Airflow's templates have them."""
    for name in ("config", "videos", "root"):
        command = command.replace(name.upper(), f"{{{{params.{name}}}}}")
    return command.split()


with DAG(
    "arlon",
    schedule=None,
    max_active_runs=1,
    params={
        "config": Param("small", type="string"),
        "videos": Param("/mnt/arlon/videos", type="string"),
        "root": Param("/mnt/arlon", type="string"),
    },
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
) as dag:
    tasks = {name: RayJob(task_id=name, command=filled(command)) for name, (_, command) in STAGES.items()}
    for name, (before, _) in STAGES.items():
        for each in before:
            tasks[each] >> tasks[name]
