"""A dataset in a bucket: what a killed run has encoded is there for the next one, on another node."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from arlon_ray import mirror
from arlon_ray.config import load_config
from data_pipeline.dataset import LatentDataset
from data_pipeline.staging import Staging
from data_pipeline.synthetic import write_samples
from jobs.preprocess import run_preprocess
from tests.data_pipeline.test_kills import JOB
from tests.s3 import client_with, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CLIPS = 60
SETTINGS = ["data.bucket_groups=[2]", "data.encoders=1", "data.encode_batch=2"]


def test_a_killed_run_goes_on_on_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("tiny", SETTINGS)
    write_samples(tmp_path / "videos", CLIPS, 0, config.video, (2,))
    with s3_server("runs") as options:
        client = client_with(options)
        output = f"s3://runs/dataset{options}"
        command = [sys.executable, "-c", JOB, "--input", str(tmp_path / "videos"), "--output", output]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        environment = {**os.environ, "ARLON_MIRROR": str(tmp_path / "one"), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, cwd=ROOT) as first:
            prefix = urlsplit(output).path.strip("/") + "/.work/encoded/bucket="
            while not client.list_objects_v2(Bucket="runs", Prefix=prefix).get("Contents"):
                assert first.poll() is None, "it ended before it could be killed"
                time.sleep(0.2)
            first.kill()

        monkeypatch.setenv("ARLON_MIRROR", str(tmp_path / "two"))
        there = mirror.local(output)
        left = sum(map(len, Staging(there).pending(16)))
        assert 0 < left < CLIPS
        summary = run_preprocess(config, tmp_path / "videos", there)
        assert not summary.skipped and summary.manifest.rows == CLIPS
        assert len(LatentDataset(there).buckets["34x64x64"].clip_ids) == CLIPS
        assert not mirror.exists(there / ".work"), "what has become the dataset is removed"
        assert run_preprocess(config, tmp_path / "videos", there).skipped
