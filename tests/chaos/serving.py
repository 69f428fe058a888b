"""A service while it makes videos: its replicas, its controller, its proxy, all of it at once, and its disk."""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from jobs.serve_demo import free_port
from tests.chaos.programs import PATIENCE_S, Program, kill
from tests.chaos.record import Fault, Order
from tests.chaos.world import World

TARGET = "serve"
#: Kind → titles of the processes, one of which is killed.
REPLICAS = {
    "AR replica": "ray::ServeReplica:arlon:ArPlanner",
    "DiT replica": "ray::ServeReplica:arlon:DiTRenderer",
    "decoder replica": "ray::ServeReplica:arlon:FrameDecoder",
    "API replica": "ray::ServeReplica:arlon:VideoAPI",
    "Serve controller": "ray::ServeController",
    "HTTP proxy": "ray::ProxyActor",
}
ALL = "all of it, and started again"
SEGMENTS = 6
REQUEST = {"prompt": "a red ball rolls to the left", "num_segments": SEGMENTS, "seed": 3, "num_inference_steps": 6}


class Balanced(httpx.BaseTransport):
    """What a load balancer does: where one address does not answer, the next one is asked."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self._at, self._transport = [httpx.URL(url) for url in urls], 0, httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Raises TransportError of the last address; of the first that took the request and broke off."""
        for left in reversed(range(len(self._urls))):
            url = self._urls[self._at]
            request.url = request.url.copy_with(host=url.host, port=url.port)
            try:
                return self._transport.handle_request(request)
            except httpx.TransportError as error:
                self._at = (self._at + 1) % len(self._urls)
                if not left or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    raise
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Give the connections back."""
        self._transport.close()


class PatientClient:
    """A client of a service that may be away: it asks again."""

    def __init__(self, *urls: str, headers: dict[str, str] | None = None) -> None:
        self.urls, self._headers = urls, headers or {}
        self.client = self.connect(20)

    def connect(self, timeout_s: float) -> httpx.Client:
        """A connection of its own."""
        timeout = httpx.Timeout(timeout_s, connect=2)
        return httpx.Client(
            base_url=self.urls[0], headers=self._headers, timeout=timeout, transport=Balanced(self.urls)
        )

    def until(self, done: Callable[[], bool]) -> None:
        """Wait until something is so."""
        end = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > end:
                raise RuntimeError(f"{self.urls[0]}: not within {PATIENCE_S:.0f} s")
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether the service says that it is well."""
        return self._answer("/healthz") is not None

    def _answer(self, path: str) -> Any:
        try:
            answer = self.client.get(path)
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def accept(self) -> str:
        """A video that the service has promised."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                answer = self.client.post("/v1/videos", json=REQUEST)
            except httpx.TransportError:
                continue
            if answer.status_code == 200:
                return str(answer.json()["id"])
            time.sleep(0.2)
        raise RuntimeError("no video was accepted")

    def video(self, name: str) -> dict[str, Any]:
        """What the service says of it, as soon as it says anything."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if (found := self._answer(f"/v1/videos/{name}")) is not None:
                return dict(found)
            time.sleep(0.05)
        raise RuntimeError(f"no word of {name}")

    def finished(self, name: str) -> int:
        """Its finished segments."""
        return sum(segment["status"] == "completed" for segment in self.video(name)["segments"])

    def settled(self, name: str) -> bool:
        """Whether nothing more will happen to it."""
        return self.video(name)["status"] in ("completed", "failed")

    def content(self, name: str) -> bytes:
        """The file of a video, when it is there."""
        end = time.monotonic() + PATIENCE_S
        self.until(lambda: self.settled(name))
        while time.monotonic() < end:
            try:
                answer = self.client.get(f"/v1/videos/{name}/content")
            except httpx.TransportError:
                continue
            if answer.status_code in (200, 404, 409):
                return answer.content
            time.sleep(0.1)
        raise RuntimeError(f"no file of {name}")

    def names(self) -> set[str]:
        """The videos that there are."""
        return {video["id"] for video in self.client.get("/v1/videos?limit=100").json()["data"]}


class Service(PatientClient):
    """`jobs/serve_bundle.py`, and a client."""

    def __init__(self, world: World, data: Path) -> None:
        self.bundle, self.data, self.port = world.bundle, data, free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.start()

    def start(self) -> None:
        """From the beginning, or again with the same files."""
        flags = ["--bundle", self.bundle, "--output", self.data, "--port", self.port]
        self.program = Program("serve_bundle", flags, self.data.with_suffix(".log"))
        self.program.until(self.answers)


class Watching:
    """Asks for the state of a video four times a second, as a page does, and counts what comes back."""

    def __init__(self, service: PatientClient, name: str) -> None:
        self.seen: Counter[str] = Counter()
        self._service, self._path = service, f"/v1/videos/{name}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._service.connect(10) as client:
            while not self._ended.wait(0.25):
                try:
                    self.seen[str(client.get(self._path).status_code)] += 1
                except httpx.TransportError as error:
                    self.seen[type(error).__name__] += 1

    def text(self) -> str:
        """The answers, by what they were."""
        return ", ".join(f"{count}× {what}" for what, count in sorted(self.seen.items())) or "no answer yet"


def inject(orders: Sequence[Order], world: World) -> Iterator[Fault]:
    """One service, one video after the other, a fault in the middle of each."""
    data = world.folder / "served"
    shutil.rmtree(data, ignore_errors=True)
    service = Service(world, data)
    try:
        expected = service.content(service.accept())
        accepted: list[str] = []
        for order in orders:
            accepted.append(service.accept())
            yield strike(service, order, accepted[-1], expected, partial(_injected, service, order))
        if missing := set(accepted) - service.names():
            raise RuntimeError(f"videos that were promised are not there: {missing}")
    finally:
        service.program.kill()


def _injected(service: Service, order: Order) -> None:
    if order.kind == ALL:
        service.program.kill()
        service.start()
        return
    title = REPLICAS[order.kind]
    service.program.until(lambda: bool(service.program.family(title)))
    kill([order.numbers.choice(service.program.family(title))])


def strike(service: PatientClient, order: Order, name: str, expected: bytes, injected: Callable[[], None]) -> Fault:
    """When so many segments are finished, and a moment later, inject it; until one more is finished."""
    moment = order.numbers.randrange(SEGMENTS - 2)
    service.until(lambda: service.finished(name) >= moment or service.settled(name))
    time.sleep(order.numbers.random() * 0.5)
    done = service.finished(name)
    with Watching(service, name) as watching:
        begin = time.perf_counter()
        injected()
        again = service.finished(name)
        service.until(lambda: service.finished(name) > done or service.settled(name))
        seconds = time.perf_counter() - begin
        content = service.content(name)
    lost = "" if again >= done else f"{done - again} finished segments"
    if content != expected:
        lost = f"another video: {content[:200]!r}" if len(content) < 500 else "another video"
    moment_text = f"after {done} of {SEGMENTS} segments"
    return Fault(order.target, order.kind, order.number, moment_text, watching.text(), seconds, lost=lost)
