"""What a part costs: parameters, bytes of its weights, floating-point operations, and the most memory in use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def weights(model: nn.Module) -> dict[str, float]:
    """Parameters and buffers: their number, and their bytes."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "weight_bytes": float(sum(t.numel() * t.element_size() for t in tensors)),
    }


def work(call: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Run `call` twice: its floating-point operations (multiply and add count two), and the most memory it held.

    Memory is what torch allocated beyond what was there before, in bytes.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return {"flops": float(counter.get_total_flops()), "peak_bytes": float(_peak(call, device))}


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return most_bytes(call)


def most_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that operations of `call` hold at once, on a CPU, or reckoned by shapes on the meta device."""
    with _Allocated() as allocated:
        call()
    return allocated.most


class _Allocated(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that still live; `most` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in inputs | self._known.keys():
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
