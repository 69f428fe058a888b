"""Two real worker processes with gloo, without Ray: for what engines do together."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from jobs.ray_session import path_with_interpreter


def run_workers(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks. Raises what a rank raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_worker, (world, port, folder, function, arguments), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _worker(
    rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    os.environ.update({"DS_ACCELERATOR": "cpu", "PATH": path_with_interpreter()})
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
