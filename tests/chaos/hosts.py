"""Three hosts (network namespaces): a head that works nothing and keeps its state in Redis, and two that do the work.

Their programs are started again when they end, as systemd or Kubernetes would. The hosts share a folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from serve.job_store import JobStore
from serve.keys import Keys
from tests.chaos import serving
from tests.chaos.programs import PATIENCE_S, ROOT, kill, titled, told
from tests.chaos.record import Fault, Order
from tests.chaos.training import STEPS, Training
from tests.chaos.world import World
from tests.namespaces import Host, hosts, why_not

TARGET = "three hosts"
HEAD, NODE, CUT, CUT_TRAINING = (
    "head, with Redis, while serving", "host, while serving", "network cut for 30 s, while serving",
    "network cut for 30 s, while training",
)  # fmt: skip
KINDS = {HEAD: 3, NODE: 2, CUT: 1, CUT_TRAINING: 1}
CUT_S = 30.0
NETWORK, REDIS_PORT, GCS_PORT, HTTP_PORT = "10.214.0", 6390, 6379, 8000
#: With ports that are given a node need not wait until its agents have chosen some.
PORTS = [
    "--dashboard-agent-grpc-port=52365",
    "--dashboard-agent-listen-port=52366",
    "--runtime-env-agent-port=52367",
    "--metrics-export-port=52368",
]
#: Seconds before a program that has ended is started again.
RESTART_S = 2.0


class RayHost:
    """A host with `ray start --block`, which is started again when it ends."""

    def __init__(self, host: Host, flags: Sequence[str], log: Path) -> None:
        self.host, self._flags, self._log = host, flags, log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        where = [f"--node-ip-address={self.host.address}", "--object-store-memory=134217728", *PORTS, *self._flags]
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "RAY_REDIS_ADDRESS": f"{NETWORK}.254:{REDIS_PORT}",
            "RAY_external_storage_namespace": "chaos",
        }  # fmt: skip
        while not self._ended.is_set():
            with self._log.open("ab") as log:
                process = self.host.popen(
                    [*command, *where], env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
                )
                while process.poll() is None and not self._ended.wait(0.2):
                    pass
            self.kill()
            self._ended.wait(RESTART_S)

    def processes(self) -> list[psutil.Process]:
        """All that runs on the host."""
        found = subprocess.run(["ip", "netns", "pids", self.host.name], capture_output=True, text=True).stdout
        processes = []
        for number in found.split():
            with suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(number)))
        return processes

    def kill(self) -> None:
        """SIGKILL to all that runs on the host: the keeper then starts Ray again."""
        kill(self.processes())

    def end(self) -> None:
        """For good."""
        self._ended.set()
        self._thread.join()
        self.kill()


@contextmanager
def redis(folder: Path) -> Iterator[None]:
    """A Redis that all hosts reach. Raises RuntimeError where there is none."""
    if (program := shutil.which("redis-server")) is None:
        raise RuntimeError("redis-server is missing: apt-get install redis-server")
    flags = ["--port", REDIS_PORT, "--bind", f"{NETWORK}.254", "--protected-mode", "no", "--save", "", "--dir", folder]
    with (folder / "redis.log").open("ab") as log:
        process = subprocess.Popen([program, *map(str, flags)], stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def three_hosts(folder: Path) -> Iterator[list[RayHost]]:
    """The head first. Raises RuntimeError where there can be no such hosts."""
    if reason := why_not():
        raise RuntimeError(reason)
    folder.mkdir(parents=True, exist_ok=True)
    with hosts(3, "chaos", NETWORK) as made, redis(folder), ExitStack() as running:
        flags = ["--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false"]
        found = []
        for number, host in enumerate(made):
            mine = flags if not number else [f"--address={made[0].address}:{GCS_PORT}", "--num-cpus=2"]
            found.append(RayHost(host, mine, folder / f"host-{number}.log"))
            running.callback(found[-1].end)
        yield found


def inject(orders: Sequence[Order], world: World) -> Iterator[Fault]:
    """A service over the hosts, then a training."""
    folder = world.folder / "hosts"
    shutil.rmtree(folder, ignore_errors=True)
    with three_hosts(folder) as found:
        if serving_orders := [order for order in orders if order.kind != CUT_TRAINING]:
            yield from _serve(serving_orders, world, found, folder / "data")
        for order in orders:
            if order.kind == CUT_TRAINING:
                yield _train(order, world, found)


def _serve(orders: Sequence[Order], world: World, found: Sequence[RayHost], data: Path) -> Iterator[Fault]:
    head, *workers = found
    data.mkdir()
    key = Keys(JobStore.in_folder(data).engine).add("chaos")
    _deploy(head.host, world.bundle, data)
    # Serve has a proxy on the head, and on every host with a replica
    urls = [f"http://{each.host.address}:{HTTP_PORT}" for each in found]
    client = serving.PatientClient(*urls, headers={"authorization": f"Bearer {key}"})
    client.until(client.answers)
    expected = client.content(client.accept())
    for order in orders:

        def injected(order: Order = order) -> None:
            if order.kind == HEAD:
                head.kill()
                return
            # where most of the work is done
            busy = max(workers, key=lambda each: len(titled(each.processes(), "ray::ServeReplica")))
            if order.kind == NODE:
                busy.kill()
            else:
                busy.host.cut()
                threading.Timer(CUT_S, busy.host.restore).start()

        yield serving.strike(client, order, client.accept(), expected, injected)
    _on_ray(head.host, "from ray import serve; serve.shutdown()")


#: What `serve deploy` has the dashboard do, which takes a dozen processes of its own.
DEPLOY = """
import json, sys
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
described = ServeDeploySchema.model_validate(json.loads(sys.argv[1]))
serve.start(proxy_location=described.proxy_location, http_options=described.http_options.model_dump())
_get_global_client().deploy_apps(described, _blocking=True)
"""


def _deploy(head: Host, bundle: Path, data: Path) -> None:
    """serve/config.yaml with keys, and with a proxy on every host."""
    described = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    described["proxy_location"] = "EveryNode"
    described["http_options"] = {"host": "0.0.0.0", "port": HTTP_PORT}
    (application,) = described["applications"]
    sets = ["serve.host=0.0.0.0", "serve.auth=on", "serve.max_running=1", "serve.requests_per_minute=1000000"]
    application["args"] = {"bundle": str(bundle), "data": str(data), "set": sets}
    _on_ray(head, DEPLOY, json.dumps(described))


def _on_ray(head: Host, program: str, *arguments: str) -> None:
    """A Python program on the head, connected to its Ray; again while hosts are on their way. Raises RuntimeError."""
    connected = f"import ray; ray.init(address='{head.address}:{GCS_PORT}', log_to_driver=False)\n{program}"
    env, end = {**os.environ, "PYTHONPATH": str(ROOT)}, time.monotonic() + PATIENCE_S
    while True:
        try:
            head.run([sys.executable, "-c", connected, *arguments], env=env, timeout_s=PATIENCE_S)
            return
        except subprocess.CalledProcessError as error:
            if time.monotonic() > end:
                raise RuntimeError(error.stdout) from None
            time.sleep(2)


def _train(order: Order, world: World, found: Sequence[RayHost]) -> Fault:
    """A training with a worker on each host, one of which cannot be reached for 30 seconds; then one undisturbed."""
    head, _, other = found

    def training(name: str) -> Training:
        output = world.folder / f"hosts-{name}"
        shutil.rmtree(output, ignore_errors=True)
        return Training("vqvae", world, output, f"{head.host.address}:{GCS_PORT}", head.host)

    disturbed = training("cut")
    fault = _cut(disturbed, order, other.host)
    whole = training("whole")
    for each in (disturbed, whole):
        if each.program.end():
            raise RuntimeError(each.program.printed()[-3000:])
    same = disturbed.artefact() == whole.artefact()
    return fault if same else Fault(**{**fault.__dict__, "lost": "other weights at the end"})


def _cut(training: Training, order: Order, host: Host) -> Fault:
    """At a random step; until the training is further than it was, or has ended."""
    program, moment = training.program, 15 + order.numbers.randrange(STEPS // 2)
    program.until(lambda: training.step() >= moment)
    step, printed, begin = training.step(), len(program.printed()), time.monotonic()
    host.cut()
    time.sleep(CUT_S)
    host.restore()
    program.until(lambda: training.step() > step or not program.running())
    seconds = time.monotonic() - begin
    program.end()
    again = [step - went_on for went_on in training.went_on(printed)]
    return Fault(
        order.target, order.kind, order.number, f"after step {step} of {STEPS}",
        told(program.printed()[printed:]), seconds, f"{again[0]} steps" if again else "",
    )  # fmt: skip
