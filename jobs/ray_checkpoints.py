"""Checkpoints of Ray Train's workers, and what is asked of them while they train."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from arlon_ray import mirror
from arlon_ray.training.checkpoints import PROGRESS_FILE, is_whole, read_progress
from arlon_ray.training.engine import Engine
from arlon_ray.training.state import is_complete

#: Seconds for which a storage that fails is tried again before the workers give up.
STORAGE_PATIENCE_S = 300.0
RETRY_S = 2.0
#: Seconds between two questions to a bucket whether the training is to stop.
ASK_S = 2.0
#: Seconds for which a checkpoint that is on its way is waited for.
SETTLE_S = 60.0


class RayCheckpoints:
    """Checkpoints through Ray Train: every rank's files are put together, and the newest two are kept.

    They are copied to the storage while the training goes on, but for those that are waited for.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._on_its_way: Path | None = None

    def newest_first(self) -> Iterator[Path]:
        """See Checkpoints. The one that Ray Train took in last, then what else is there, should that be damaged."""
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return
        newest = self.folder / Path(checkpoint.path).name
        older = [path for path in mirror.glob(self.folder, "step-*") if path.name < newest.name]
        found = (mirror.pull(path) for path in (newest, *reversed(older)))
        yield from (path for path in found if read_progress(path).get("key") == self.key)

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float], *, wait: bool) -> Path:
        """See Checkpoints. Ray takes a checkpoint in when all ranks' files are there."""
        import ray.train

        name = f"step-{step:08d}"
        partial = Path(tempfile.mkdtemp(prefix="arlon-checkpoint-"))
        try:
            fill(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        mode = ray.train.CheckpointUploadMode
        ray.train.report(
            {"step": step, **values},
            checkpoint=ray.train.Checkpoint.from_directory(str(partial)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=mode.SYNC if wait else mode.ASYNC,
            checkpoint_upload_fn=self._upload,
            delete_local_checkpoint_after_upload=True,
        )
        self._on_its_way = self.folder / name
        if wait:
            self.settle()
        return self._on_its_way

    def settle(self) -> None:
        """Wait until all ranks' files of the latest checkpoint lie in the storage, or for `SETTLE_S`."""
        import ray.train

        end, folder = time.monotonic() + SETTLE_S, self._on_its_way
        while folder and not _is_there(folder) and time.monotonic() < end:
            time.sleep(0.1)
        if folder and ray.train.get_context().get_world_rank() == 0:
            # it is evaluated here; of a bucket's, earlier ones are only in the way
            mirror.pull(folder)
            for old in folder.parent.glob("step-*") if mirror.origin(folder) else ():
                if old != folder:
                    mirror.forget(old)

    def _upload(self, checkpoint: Any, name: str) -> Any:
        """Copy this rank's files to the storage, again and again while it fails. Raises OSError in the end."""
        import ray.train

        source, target, begin = Path(checkpoint.path), self.folder / name, time.monotonic()
        while True:
            try:
                copy_whole(source, target)
                files, place = mirror.filesystem(target)
                return ray.train.Checkpoint(place, files) if files else ray.train.Checkpoint.from_directory(place)
            except OSError as error:
                if error.errno == errno.ENOSPC or time.monotonic() - begin > STORAGE_PATIENCE_S:
                    raise
                time.sleep(RETRY_S)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a checkpoint's files; what says that they are whole comes last, and nothing appears under its name in part.

    Raises OSError; also where the folder that holds `target` is gone.
    """
    remote = mirror.origin(target) is not None
    if not remote:
        target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == PROGRESS_FILE):
        if remote:
            mirror.upload(path, target / path.name)
            continue
        partial = target / f".{path.name}.partial"
        shutil.copyfile(path, partial)
        if partial.stat().st_size != path.stat().st_size:
            raise OSError(errno.EIO, f"{partial} has {partial.stat().st_size} of {path.stat().st_size} bytes")
        partial.replace(target / path.name)


def _is_there(folder: Path) -> bool:
    """Whether all files of a checkpoint are in the storage; of one in a bucket by their names."""
    if mirror.origin(folder) is None:
        return is_whole(folder)
    names = [path.name for path in mirror.glob(folder, "*")]
    return PROGRESS_FILE in names and is_complete(names)


def storage_is_back(folder: Path) -> bool:
    """Wait until the folder can be written to again; False if that takes longer than `STORAGE_PATIENCE_S`."""
    end = time.monotonic() + STORAGE_PATIENCE_S
    while time.monotonic() < end:
        try:
            mirror.check_writable(folder)
            return True
        except OSError:
            time.sleep(RETRY_S)
    return False


def stop_file(folder: Path, attempt: str) -> Path:
    """Where it is, the workers of this attempt end after a checkpoint."""
    return folder / f"stop-{attempt}"


class RayWatch:
    """Asked by all ranks after every step; they all get the same answer.

    "stop" where the driver was told to end; "save" once where Ray says that a machine will be taken away.
    """

    def __init__(self, file: Path, engine: Engine, look_every: int) -> None:
        """`look_every`: steps between two questions to Ray, each of which all ranks wait for."""
        self.file, self.engine, self.look_every = file, engine, look_every
        self._saved = False
        self._asked_at, self._stop = -math.inf, False

    def wish(self, step: int) -> Literal["none", "save", "stop"]:
        """See Watch."""
        if self.engine.average({"stop": float(self._told_to_stop())})["stop"]:
            return "stop"
        if self._saved or step % self.look_every:
            return "none"
        import ray.train

        self._saved = ray.train.get_preemption_info() is not None
        return "save" if self._saved else "none"

    def _told_to_stop(self) -> bool:
        """A bucket is asked every `ASK_S` seconds, a folder every time."""
        if self.engine.rank == 0 and time.monotonic() - self._asked_at >= (ASK_S if mirror.origin(self.file) else 0):
            self._asked_at, self._stop = time.monotonic(), _is_file(self.file)
        return self._stop


def _is_file(path: Path) -> bool:
    """False also where the storage fails."""
    try:
        return mirror.exists(path)
    except OSError:
        return False
