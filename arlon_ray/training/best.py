"""The checkpoint at which a figure of held-out samples was best, kept beside the newest ones."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from arlon_ray import mirror
from arlon_ray.artifact import whole_folder, write_json
from arlon_ray.training.checkpoints import is_whole, read_progress

FOLDER, NOTE_FILE = "best", "best.json"


@dataclass(frozen=True)
class Best:
    """The figure after `step` steps."""

    figure: str
    step: int
    value: float


class BestCheckpoint:
    """A copy of the best checkpoint in `best/`, beside those that it was chosen from.

    It outlives them, and the training that wrote it: a run that goes on compares with what is there.
    """

    def __init__(self, folder: Path, key: str, figure: str, more_is_better: bool) -> None:
        self.folder, self.key, self.figure, self.more_is_better = folder / FOLDER, key, figure, more_is_better

    def read(self) -> Best | None:
        """What is kept; None where nothing of this run is, or not whole."""
        try:
            best = Best(**json.loads((mirror.pull(self.folder) / NOTE_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        ours = best.figure == self.figure and read_progress(self.folder).get("key") == self.key
        return best if ours and is_whole(self.folder) else None

    def offer(self, checkpoint: Path, step: int, value: float) -> bool:
        """Keep the checkpoint if its value is better than what is kept; whether it was. Raises OSError."""
        kept = self.read()
        # steps that a resumed run makes again have the same value: that of the later step gives way
        if not math.isfinite(value) or (kept and not self._better(value, kept.value)):
            return False
        with whole_folder(self.folder) as partial:
            for path in checkpoint.iterdir():
                _link(path, partial / path.name)
            write_json(partial / NOTE_FILE, asdict(Best(self.figure, step, value)))
        return True

    def _better(self, value: float, other: float) -> bool:
        return value > other if self.more_is_better else value < other


def _link(source: Path, target: Path) -> None:
    """The same file once more, or a copy where the storage has no links. Checkpoints are never written to again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
