"""Checkpoints of several workers in one folder, without Ray: every rank writes its files into the same place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist


class SharedCheckpoints:
    """See arlon_ray.training.loop.Checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), reverse=True)

    def write(self, step: int, fill: Callable[[Path], None], values: Mapping[str, float]) -> Path:
        target = self.folder / f"step-{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        fill(target)
        dist.barrier()
        return target
