"""Every stage's training on a cluster of three nodes, while its workers and its nodes are killed and its files damaged.

Two workers train. A node that dies is replaced by another one, as a cluster's autoscaler or an operator would.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from arlon_ray.artifact import load_artifact
from arlon_ray.training.checkpoints import PROGRESS_FILE
from jobs.journal import JOURNAL_FILE
from jobs.serve_demo import free_port
from tests.chaos.files import damage
from tests.chaos.programs import PATIENCE_S, Program, kill, told
from tests.chaos.record import Fault, Order
from tests.chaos.world import SMALL_SETS, World
from tests.namespaces import Host

WORKER, NODE, DRIVER = "training worker", "node", "driver, and a damaged checkpoint"
KINDS = {WORKER: 2, NODE: 1, DRIVER: 1}
#: Stage → (job, its artefact's kind, section of the configuration).
STAGES = {
    "vae": ("train_vae", "vae", "vae"),
    "vqvae": ("train_vqvae", "codec", "vqvae.fine"),
    "ar": ("train_ar", "ar", "ar"),
    "dit": ("train_dit", "dit", "dit"),
}
TARGETS = {f"train {stage}": stage for stage in STAGES}
STEPS, EVERY = 400, 20
#: A checkpoint that was reported so long ago has certainly been taken in.
TAKEN_IN_S = 3.0


class Training:
    """One stage's training on a cluster; whoever ends it starts it again."""

    def __init__(self, stage: str, world: World, output: Path, address: str, host: Host | None = None) -> None:
        self.job, self.kind, section = STAGES[stage]
        self.output, self.address, self.host = output, address, host
        self.log = output.with_suffix(".log")
        settings = [f"steps={STEPS}", "batch_size=4", "held_out=2", f"checkpoint_every={EVERY}", "log_every=1"]
        sets = [f"{section}.training.{setting}" for setting in settings]
        sets += ["cluster.num_workers=2", "cluster.max_failures=1000"]
        self.flags = [*_inputs(stage, world), *SMALL_SETS, *(word for each in sets for word in ("--set", each))]
        self.start()

    def start(self) -> None:
        """The same command, from the beginning or again."""
        flags = [*self.flags, "--output", self.output]
        self.program = Program(self.job, flags, self.log, env={"RAY_ADDRESS": self.address}, host=self.host)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the workers have told of this kind."""
        found = []
        for path in self.output.glob(f".*.training/*/{JOURNAL_FILE}"):
            for line in path.read_text(errors="replace").splitlines():
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # cut short by a worker's death
                found += [event] if event["kind"] == kind else []
        return found

    def step(self) -> int:
        """Steps made, of late."""
        steps = [event["step"] for event in self.events("metrics")]
        return steps[-1] if steps else 0

    def went_on(self, told_before: int) -> list[int]:
        """The steps behind which it has gone on (0: begun anew), as it was told behind so many characters."""
        printed = self.program.printed()[told_before:]
        steps = [int(step) for step in re.findall(r"going on after step (\d+)", printed)]
        return steps or [0 for _ in re.findall(r"parameters train", printed)]

    def until_beyond(self, step: int, told_before: int) -> None:
        """Wait until it has gone on and is further than `step`, or at its end."""
        ended = self.program.process.poll
        self.program.until(lambda: bool(self.went_on(told_before)) and (self.step() > step or ended() == 0))

    def checkpoints(self) -> list[Path]:
        """Those that lie in the storage whole, the oldest first."""
        found = self.output.glob(f".*.training/*/step-*/{PROGRESS_FILE}")
        return sorted(path.parent for path in found)

    def artefact(self) -> str:
        """sha256 of the weights."""
        (path,) = (found.parent for found in self.output.glob("*/lineage.json"))
        return load_artifact(path, self.kind).fingerprint


def _inputs(stage: str, world: World) -> list[object]:
    parts, codecs = world.parts, ["--codec-fine", world.parts / "codec_fine"]
    if stage == "vae":
        return ["--input", world.videos]
    data: list[object] = ["--dataset", world.dataset, "--vae", parts / "vae"]
    if stage == "vqvae":
        return [*data, "--role", "fine"]
    data += ["--tokens", world.tokens]
    return [*data, *codecs, *(["--codec-coarse", parts / "codec_coarse"] if stage == "dit" else [])]


@contextmanager
def cluster() -> Iterator[Any]:
    """A head and two more nodes, of one CPU each: real raylets on this machine."""
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    try:
        add(nodes, include_dashboard=False)
        for _ in range(2):
            add(nodes)
        nodes.wait_for_nodes()
        yield nodes
    finally:
        nodes.shutdown()


def add(nodes: Any, **more: Any) -> None:
    """One more node; again where Ray's 30 seconds were not enough for a machine at its limit."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            nodes.add_node(**_node(), **more)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or time.monotonic() > end:
                raise


def _node() -> dict[str, int]:
    """One CPU. With ports that are given a node need not wait until its agents have chosen some."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return {"num_cpus": 1, "object_store_memory": 2**27, **{name: free_port() for name in names}}


def inject(orders: Sequence[Order], world: World) -> Iterator[Fault]:
    """Train the stage undisturbed, then again with all the faults."""
    stage = TARGETS[orders[0].target]
    with cluster() as nodes:
        whole = Training(stage, world, world.folder / f"{stage}-whole", nodes.address)
        if whole.program.end():
            raise RuntimeError(whole.program.printed()[-3000:])
        disturbed = world.folder / f"{stage}-disturbed"
        shutil.rmtree(disturbed, ignore_errors=True)
        training = Training(stage, world, disturbed, nodes.address)
        faults = []
        try:
            for number, order in enumerate(orders):
                # spread over the training, each at a random moment of its share
                first, share = EVERY + 2, (STEPS - EVERY - 12) // len(orders)
                faults.append(_strike(training, order, first + number * share + order.numbers.randrange(share), nodes))
            if training.program.end():
                raise RuntimeError(training.program.printed()[-3000:])
        finally:
            training.program.kill()
        same = training.artefact() == whole.artefact()
    for fault in faults:
        yield fault if same else Fault(**{**fault.__dict__, "lost": fault.lost or "other weights at the end"})


def _strike(training: Training, order: Order, moment: int, nodes: Any) -> Fault:
    """At step `moment` inject the fault, and wait until the training is further than it was."""
    training.program.until(lambda: training.step() >= moment)
    kept = [path for path in training.checkpoints() if time.time() - path.stat().st_mtime > TAKEN_IN_S]
    safe = int(kept[-1].name.rpartition("-")[2]) if kept else 0
    step, told_before, begin = training.step(), len(training.program.printed()), time.perf_counter()
    if order.kind == WORKER:
        kill([order.numbers.choice(_workers(nodes))])
    elif order.kind == NODE:
        nodes.remove_node(order.numbers.choice(_with_workers(nodes)), allow_graceful=False)
        add(nodes)
    else:
        training.program.process.kill()
        training.program.end()
        newest = training.checkpoints()[-1]
        damage(order.numbers.choice(sorted(newest.iterdir())), order.numbers)
        safe, told_before = safe - EVERY, 0
        training.start()

    training.until_beyond(step, told_before)
    seconds = time.perf_counter() - begin
    went_on = training.went_on(told_before)[0]
    lost = f"the checkpoint of step {safe}: it went on after {went_on}" if went_on < safe else ""
    return Fault(
        order.target, order.kind, order.number, f"after step {step} of {STEPS}",
        told(training.program.printed()[told_before:]), seconds, f"{step - went_on} steps", lost,
    )  # fmt: skip


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _training_below(raylet: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in raylet.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _workers(nodes: Any) -> list[psutil.Process]:
    """The processes that train, on any node."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := [process for node in nodes.list_all_nodes() for process in _training_below(_raylet(node))]:
            return found
        time.sleep(0.2)
    raise RuntimeError("no training worker was found")


def _with_workers(nodes: Any) -> list[Any]:
    """The nodes but the head on which there is something that trains."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := [node for node in nodes.worker_nodes if _training_below(_raylet(node))]:
            return sorted(found, key=lambda node: node.node_id)
        time.sleep(0.2)
    raise RuntimeError("no node but the head trains")
