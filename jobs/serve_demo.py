"""The pipeline's last stage: serve the bundle, post one request with progressive prompts, keep what comes back."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from arlon_ray.artifact import ArtifactError, read_object, write_json
from arlon_ray.bundle import load_bundle
from arlon_ray.config import Config, config_fingerprint
from arlon_ray.generation.video import contact_sheet, read_video
from jobs.ray_session import connect
from serve.app import serve_bundle

DEMO_PROMPTS = ("A red circle moves to the right.", "A red circle moves to the left.")
DEMO_SEGMENTS = 6
FILES = ("demo.mp4", "demo.png", "baseline.mp4", "baseline.png")
RECORD = "demo.json"  # what they were made with
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class DemoResult:
    """The guided video: its frames, its wall-clock time, and the share of the work that was the AR's."""

    frames: int
    seconds_per_video: float
    ar_share: float
    skipped: bool = False


def serve_demo(config: Config, bundle: Path, output: Path) -> DemoResult:
    """Write demo.mp4, its contact sheet demo.png, and the text-only baseline.mp4 (and .png) into `output`.

    What this bundle has made there with these settings stays: nothing is served then. Raises RuntimeError if a video
    fails.
    """
    made_with = {
        "bundle": load_bundle(bundle).fingerprint,
        "settings": config_fingerprint(config.sampling, config.serve),
    }
    if there := _there(output, made_with):
        return there
    serve_config = config.serve.model_copy(update={"port": free_port(config.serve.host)})
    with (
        connect(config),
        serve_bundle(config.model_copy(update={"serve": serve_config}), load_bundle(bundle), output / "serve") as url,
        httpx.Client(base_url=url, timeout=60.0) as client,
    ):
        print(f"serving at {url}", flush=True)
        video, seconds = _make(client, output / "demo.mp4", baseline=False)
        _make(client, output / "baseline.mp4", baseline=True)
    times = video["timings"]
    work = {part: sum(row[f"{part}_s"] or 0.0 for row in times) for part in ("ar", "dit", "decode")}
    result = DemoResult(
        frames=sum(segment["frames"] for segment in video["segments"]),
        seconds_per_video=seconds,
        ar_share=work["ar"] / max(sum(work.values()), 1e-9),
    )
    write_json(output / RECORD, {**made_with, "result": asdict(result)})
    return result


def _there(output: Path, made_with: dict[str, str]) -> DemoResult | None:
    try:
        found = read_object(output / RECORD)
        result = DemoResult(**{**found.pop("result"), "skipped": True})
    except (ArtifactError, KeyError, TypeError):
        return None
    return result if found == made_with and all((output / name).is_file() for name in FILES) else None


def _make(client: httpx.Client, path: Path, baseline: bool) -> tuple[dict[str, Any], float]:
    """Post, wait, download; returns the finished video object and its seconds."""
    begin = time.perf_counter()
    segments = [{"prompt": prompt} for prompt in DEMO_PROMPTS]
    request = {"segments": segments, "num_segments": DEMO_SEGMENTS, "seed": 1, "baseline": baseline}
    response = client.post("/v1/videos", json=request)
    response.raise_for_status()
    video = response.json()
    while video["status"] not in ("completed", "failed"):
        if time.perf_counter() - begin > TIMEOUT_S:
            raise RuntimeError(f"video {video['id']} is still {video['status']} after {TIMEOUT_S:.0f} s")
        time.sleep(0.2)
        video = client.get(f"/v1/videos/{video['id']}").raise_for_status().json()
    if video["status"] == "failed":
        raise RuntimeError(f"video {video['id']} failed: {video['error']['message']}")
    seconds = time.perf_counter() - begin
    path.write_bytes(client.get(f"/v1/videos/{video['id']}/content").raise_for_status().content)
    contact_sheet(path.with_suffix(".png"), read_video(path)[::3], columns=12)
    print(f"{path.name}: {len(video['segments'])} segments in {seconds:.1f} s", flush=True)
    return video, seconds


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on, so that the demo never collides with a service of the user's."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
