"""What is kept is bounded, and what was used last stays."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from arlon_ray.generation.decoder import Graphs
from arlon_ray.latest import Latest


def test_the_keys_that_were_used_last_are_kept() -> None:
    latest: Latest[str, int] = Latest(2)
    assert latest.put("a", 1) == 1 and latest.put("b", 2) == 2
    assert latest.get("a") == 1  # used again: "b" makes room
    latest.put("c", 3)
    assert (latest.get("a"), latest.get("b"), latest.get("c"), len(latest)) == (1, None, 3, 2)
    latest.put("a", 4)
    assert latest.get("a") == 4 and len(latest) == 2
    latest.clear()
    assert latest.get("a") is None and not len(latest)


def add(total: torch.Tensor, number: int) -> None:
    total += number


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_that_made_room_are_captured_again() -> None:
    device = torch.device("cuda")
    graphs, total, done = Graphs(device, most=2), torch.zeros(1, device=device), 0
    for _ in range(4):
        for key in range(3):  # one more than are kept: each round captures all of them again
            graphs.run(key, partial(add, total, 10**key))
            done += 10**key
            assert float(total) == done and len(graphs._graphs) <= 2
