"""kill -9 of a worker, the driver and the node process at random moments: the dataset is that of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.dataset
import pytest
import torch

from data_pipeline.manifest import DatasetManifest, read_manifest
from data_pipeline.staging import Staging
from tests.data_pipeline.inputs import write_video

ROOT = Path(__file__).parents[2]
VIDEOS, CLIPS = 40, 160
#: The job itself, but its work in small parts, so that there is much to interrupt.
JOB = (
    "import jobs.preprocess as job, data_pipeline.ray_pipeline as wiring; "
    "job.PART_CLIPS, wiring.BLOCK_BYTES = 4, 2**20; job.run(job.main)"
)
PATIENCE_S = 240.0


class Job:
    """`jobs/preprocess.py` as a process of its own."""

    def __init__(self, videos: Path, output: Path) -> None:
        flags = ["--input", str(videos), "--output", str(output), "--set", "data.bucket_groups=[2]"]
        self.staging, self.log = Staging(output), output.with_suffix(".log")
        with self.log.open("a") as log:
            command = [sys.executable, "-c", JOB, *flags]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def reach(self, rows: int) -> None:
        """Wait until so many clips are encoded, or the job has ended."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and self.staging.encoded_rows() < rows:
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def reach_process(self, name: str) -> None:
        """Wait until it has a process of this name."""
        end = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and not self.family(name):
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def family(self, name: str) -> list[psutil.Process]:
        """Its processes, and theirs, whose title begins with `name`."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if " ".join(child.cmdline()).startswith(name) or child.name() == name]

    def end(self) -> int:
        """Wait until it has ended; its exit code."""
        return self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips a file, all different."""
    folder = tmp_path_factory.mktemp("videos")
    numbers = random.Random(0)
    for number in range(VIDEOS):
        frames = torch.randint(0, 255, (136, 8, 8, 3), generator=torch.Generator().manual_seed(number)).byte()
        large = frames.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
        write_video(folder / f"{number:03d}.mp4", large, crf=str(numbers.randint(20, 30)))
        (folder / f"{number:03d}.txt").write_text(f"noise number {number}")
    return folder


def content(output: Path) -> dict[int, int]:
    """A hash of everything of each clip but where its file lies, by id. Fails if a clip is there twice."""
    table = pyarrow.dataset.dataset(output / "latents", partitioning="hive").to_table().drop_columns("uri")
    rows = {row["clip_id"]: hash(str(sorted(row.items()))) for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def encoded(staging: Staging) -> dict[Path, int]:
    """Files of the encoders and when they were written."""
    return {path: path.stat().st_mtime_ns for path in staging.encoded_files()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, videos: Path) -> dict[int, int]:
    """What a run that nobody disturbs makes."""
    job = Job(videos, tmp_path_factory.mktemp("whole") / "set")
    assert job.end() == 0, job.log.read_text()[-3000:]
    rows = content(job.staging.root.parent)
    assert len(rows) == CLIPS
    return rows


@pytest.mark.ray
@pytest.mark.slow
def test_kills_at_random_moments_leave_the_dataset_of_an_unbroken_run(
    tmp_path: Path, videos: Path, unbroken: dict[int, int]
) -> None:
    moments, output = random.Random(os.getpid()), tmp_path / "set"
    first = Job(videos, output)
    first.reach(1)
    victims = first.family("ray::Map")
    assert victims, "no worker found"
    moments.choice(victims).kill()
    first.reach(moments.randint(CLIPS // 6, CLIPS // 3))
    assert first.process.poll() is None, "a worker's death ended the run"
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    before = encoded(first.staging)
    assert 0 < first.staging.encoded_rows() < CLIPS

    second = Job(videos, output)
    second.reach_process("raylet")
    raylets = second.family("raylet")  # looking for them takes as long as some clips
    second.reach(first.staging.encoded_rows() + moments.randint(1, CLIPS // 6))
    for raylet in raylets:
        raylet.kill()
    assert second.end() != 0, "the node's death went unnoticed"

    third = Job(videos, output)
    third.reach(CLIPS)
    after = encoded(third.staging)
    assert third.end() == 0, third.log.read_text()[-3000:]
    # what was encoded was not encoded again
    assert not after or before.items() <= after.items()
    assert content(output) == unbroken
    assert read_manifest(output, DatasetManifest).rows == CLIPS
