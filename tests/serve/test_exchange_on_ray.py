"""`serve deploy` with another bundle while requests keep coming: none is refused, none is lost, none is a mixture."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from arlon_ray.bundle import load_bundle
from arlon_ray.config import load_config
from jobs.ray_session import connect
from jobs.serve_demo import free_port
from tests.bundles import make_random_bundle

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SEEDS, SEGMENTS, PROMPT = 3, 3, "a red ball rolls to the left"


def ask(client: httpx.Client, seed: int) -> httpx.Response:
    """For a video."""
    return client.post("/v1/videos", json={"prompt": PROMPT, "num_segments": SEGMENTS, "seed": seed})


@dataclass
class Clients:
    """Two that ask for videos, and one that watches each, until they are told to stop. Every answer must be good."""

    url: str
    asked: list[tuple[str, int]] = field(default_factory=list)  # (id, seed)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._stop.is_set():
                seed = len(self.asked) % SEEDS
                began = time.monotonic()
                try:
                    answers = [ask(client, seed), client.get("/v1/models"), client.get("/v1/videos")]
                except httpx.HTTPError as error:
                    self.wrong.append(repr(error))
                    continue
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.wrong += [each.text for each in answers if each.status_code != 200]
                if answers[0].status_code == 200:
                    self.asked.append((answers[0].json()["id"], seed))
                self._stop.wait(0.4)

    def until_more(self, count: int) -> None:
        """Wait until so many more have been accepted."""
        wanted = len(self.asked) + count
        until(lambda: len(self.asked) >= wanted)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Until the block ends."""
        threads = [threading.Thread(target=self._ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(60)


def until(done: Callable[[], bool], limit_s: float = 120) -> None:
    """Wait for it."""
    deadline = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


class Deployed:
    """serve/config.yaml on a Ray that runs, and `serve deploy` of the same file with another bundle in it."""

    def __init__(self, first: Path, data: Path) -> None:
        self._file: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
        port = self._file["http_options"]["port"] = free_port()
        (self._application,) = self._file["applications"]
        self._application["args"] |= {"bundle": str(first), "data": str(data)}
        self._application["args"]["set"] += ["serve.max_queued=1000", "serve.max_queued_per_key=1000"]
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.deploy(first)
        until(self._up)

    def deploy(self, bundle: Path) -> None:
        """As `serve deploy` does with the changed file."""
        self._application["deployments"] = [{"name": "VideoAPI", "user_config": {"bundle": str(bundle)}}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(self._file))

    def _up(self) -> bool:
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    def health(self) -> dict[str, Any]:
        """Of the service."""
        return self.client.get("/healthz").json()

    def change(self, bundle: Path) -> None:
        """Deploy it, and wait until it is served."""
        self.deploy(bundle)
        name = load_bundle(bundle).fingerprint[:12]
        until(lambda: self.health()["bundle"] == name)

    def finished(self, name: str) -> tuple[dict[str, Any], bytes]:
        """A video, and its file."""
        where = f"/v1/videos/{name}"
        until(lambda: self.client.get(where).json()["status"] in ("completed", "failed"))
        video = self.client.get(where).json()
        assert video["status"] == "completed", video["error"]
        return video, self.client.get(f"{where}/content").content

    def alone(self) -> list[bytes]:
        """What the bundle that is served makes of each seed, while nothing else is asked for."""
        return [self.finished(ask(self.client, seed).json()["id"])[1] for seed in range(SEEDS)]


def test_a_bundle_is_exchanged_there_and_back_under_load(tmp_path: Path) -> None:
    one = make_random_bundle(tmp_path / "one", "dit.depth=4")
    two = make_random_bundle(tmp_path / "two", "dit.depth=4", "ar.dim=64", "dit.hidden_size=64")
    with connect(load_config("tiny")):
        try:
            here = Deployed(one, tmp_path / "data")
            expected = {here.health()["bundle"]: here.alone()}
            here.change(two)
            expected[here.health()["bundle"]] = here.alone()
            assert len({content for files in expected.values() for content in files}) == 2 * SEEDS
            here.change(one)
            clients = Clients(str(here.client.base_url))
            with clients.at_work():
                clients.until_more(4)
                for bundle in (two, one):
                    here.change(bundle)
                    clients.until_more(4)
                (tmp_path / "damaged").mkdir()
                for bundle in (tmp_path / "damaged", tmp_path / "missing"):
                    here.deploy(bundle)
                    until(lambda: here.health()["change"] == "refused")
                clients.until_more(2)
            assert clients.wrong == []
            made = Counter[str]()
            for name, seed in clients.asked:
                video, content = here.finished(name)
                assert content == expected[video["bundle"]][seed], (video["bundle"], seed)
                made[video["bundle"]] += 1
            assert set(made) == set(expected)
            print(f"videos of each bundle {list(made.values())}; slowest answers {clients.slowest_s:.2f} s")
        finally:
            serve.shutdown()
