"""Preprocessing, from raw video to a dataset, while its workers, its driver, its node and its files are taken away."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.dataset

from data_pipeline.staging import Staging
from tests.chaos.files import damage
from tests.chaos.programs import Program, kill, told
from tests.chaos.record import Fault, Order
from tests.chaos.world import SMALL_SETS, World

TARGET = "preprocess"
WORKER, DRIVER, NODE, PART, DISK = "data worker", "driver", "its only node", "part of an unfinished run", "disk full"
#: Clips of a part of the work: few, so that there is much to interrupt.
SMALL_PARTS = "import jobs.preprocess, data_pipeline.ray_pipeline as wiring; jobs.preprocess.PART_CLIPS = 2"
DISK_MIB = 1


class Preprocessing:
    """One dataset that is made in spite of everything: whoever ends it starts it again."""

    def __init__(self, world: World, output: Path) -> None:
        self.world, self.output, self.log = world, output, output.with_suffix(".log")
        self.staging = Staging(output)
        self.start()

    def start(self) -> None:
        """The same command, from the beginning or again."""
        flags = ["--input", self.world.many_videos, "--vae", self.world.parts / "vae", *SMALL_SETS]
        sets = ["--set", "data.bucket_groups=[2]", "--set", "data.encode_batch=2"]
        self.program = Program("preprocess", [*flags, *sets, "--output", self.output], self.log, prelude=SMALL_PARTS)

    def rows(self) -> int:
        """Clips that are encoded."""
        return Staging(self.output).encoded_rows()

    def files(self) -> dict[Path, int]:
        """What the encoders have finished, and when."""
        return {path: path.stat().st_mtime_ns for path in self.staging.encoded_files()}


def inject(orders: Sequence[Order], world: World) -> Iterator[Fault]:
    """Disturb the making of one dataset after the other, until all orders are done."""
    expected = content(world.whole_dataset)
    left = list(orders)
    while left:
        output = world.folder / "disturbed"
        shutil.rmtree(output, ignore_errors=True)
        job = Preprocessing(world, output)
        faults = []
        try:
            while left and (fault := _strike(job, left[0], len(expected))):
                faults.append(fault)
                left.pop(0)
            if job.program.end():
                raise RuntimeError(job.program.printed()[-3000:])
        finally:
            job.program.kill()
        different = "" if content(output) == expected else "another dataset than that of an unbroken run"
        yield from (_with(fault, different) for fault in faults)


def _with(fault: Fault, lost: str) -> Fault:
    return Fault(**{**fault.__dict__, "lost": " / ".join(text for text in (fault.lost, lost) if text)})


def content(dataset: Path) -> dict[int, str]:
    """All of each clip but where its file lies, by id."""
    table = pyarrow.dataset.dataset(dataset / "latents", partitioning="hive").to_table().drop_columns("uri")
    rows = {row["clip_id"]: str(sorted(row.items())) for row in table.to_pylist()}
    if len(rows) != len(table):
        raise RuntimeError(f"{dataset}: clips are there twice")
    return rows


def _strike(job: Preprocessing, order: Order, total: int) -> Fault | None:
    """Wait for a moment, inject the fault, and wait until the work has gone on; None where the run is nearly over."""
    done = job.rows()
    if done > total * 0.7:
        return None
    if order.kind == DISK:
        return _full_disk(job, order)
    moment = done + order.numbers.randint(1, max(1, total // 8))
    job.program.until(lambda: job.rows() >= moment or not job.program.running())
    if not job.program.running():  # it was done before the moment had come
        return None
    before, seen_from, begin = job.files(), len(job.program.printed()), time.perf_counter()
    rows = job.rows()
    damaged = _injected(job, order)
    if not job.program.running():
        seen = told(job.program.printed()[seen_from:])
        job.start()
        seen_from = 0
    else:
        seen = ""
    job.program.until(lambda: job.rows() > rows)
    seconds = time.perf_counter() - begin
    seen = seen or told(job.program.printed()[seen_from:]) or "nothing: it goes on"
    after = job.files()
    gone = [path for path, when in before.items() if path != damaged and after.get(path) != when]
    return Fault(
        TARGET, order.kind, order.number, f"after {rows} of {total} clips", seen, seconds,
        lost=f"{len(gone)} encoded files" if gone and after else "",
    )  # fmt: skip


def _injected(job: Preprocessing, order: Order) -> Path | None:
    """Inject it; the file that was damaged, if it was one."""
    program = job.program
    if order.kind == WORKER:
        program.until(lambda: bool(program.family("ray::Map", "ray::_Map")))
        kill([order.numbers.choice(program.family("ray::Map", "ray::_Map"))])
        return None
    if order.kind == NODE:
        kill(program.family("raylet"))
        program.end()
        return None
    os.kill(program.process.pid, signal.SIGKILL)
    program.process.wait()
    if order.kind == PART:
        path = order.numbers.choice(job.staging.encoded_files())
        damage(path, order.numbers)
        return path
    return None


def _full_disk(job: Preprocessing, order: Order) -> Fault:
    """The same command onto a disk of one MiB, which is then made larger."""
    disk = job.world.folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", str(disk)], check=True)
    try:
        other = Preprocessing(job.world, disk / "dataset")
        code = other.program.end()
        seen, begin = f"exit code {code}: {told(other.program.printed())}", time.perf_counter()
        rows = other.rows()
        subprocess.run(["mount", "-o", "remount,size=512m", str(disk)], check=True)
        other.start()
        if other.program.end():
            raise RuntimeError(other.program.printed()[-3000:])
        seconds = time.perf_counter() - begin
        same = content(disk / "dataset") == content(job.world.whole_dataset)
        lost = "" if same else "another dataset than that of an unbroken run"
        return Fault(TARGET, DISK, order.number, f"after {rows} clips", seen, seconds, lost=lost)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
