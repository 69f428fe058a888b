"""A text-only bundle behind a real Ray Serve: no AR is deployed, and what it makes is what the library makes."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from arlon_ray.bundle import load_bundle
from arlon_ray.config import override
from arlon_ray.generation import VideoGenerator
from arlon_ray.generation.video import encode_fragment, join_fragments, read_video
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from serve.app import APP, serve_bundle
from tests.opensora.public import make_public_bundle

pytestmark = pytest.mark.ray


def test_it_is_served_without_an_ar(tmp_path: Path) -> None:
    from ray import serve

    path = make_public_bundle(tmp_path)
    bundle = load_bundle(path)
    small = [f"serve.{stage}.num_gpus=0" for stage in ("dit", "decoder")]
    config = override(
        bundle.config, [*small, "serve.dit.num_cpus=0.5", "serve.decoder.num_cpus=0.25", f"serve.port={free_port()}"]
    )
    with connect(config), serve_bundle(config, bundle, tmp_path / "data") as url, httpx.Client(base_url=url) as client:
        assert set(serve.status().applications[APP].deployments) == {"VideoAPI", "DiTRenderer", "FrameDecoder"}
        made = client.post("/v1/videos", json={"prompt": "a red circle", "seed": 3, "num_segments": 2}).json()
        deadline = time.monotonic() + 60
        while made["status"] not in ("completed", "failed") and time.monotonic() < deadline:
            time.sleep(0.1)
            made = client.get(f"/v1/videos/{made['id']}").json()
        assert made["status"] == "completed", made
        (tmp_path / "served.mp4").write_bytes(client.get(f"/v1/videos/{made['id']}/content").content)
    parts = list(VideoGenerator(bundle).generate(["a red circle"] * 2, seed=3))
    join_fragments([encode_fragment(part, config.video.fps) for part in parts], tmp_path / "here.mp4")
    served, here = read_video(tmp_path / "served.mp4"), read_video(tmp_path / "here.mp4")
    assert served.shape == here.shape == (51, 64, 64, 3)
    assert np.abs(served.astype(int) - here.astype(int)).mean() < 1
