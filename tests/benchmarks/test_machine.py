"""What figures are made of."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.machine import in_turns


def test_works_take_turns_and_are_compared_with_the_first() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = in_turns({"plain": lambda: work("plain", 0.06), "ours": lambda: work("ours", 0.02)}, runs=3)
    assert order == ["plain", "ours"] * 4  # once to warm up
    assert found["plain"]["times_as_fast"] == 1.0
    assert found["ours"]["from"] <= found["ours"]["times_as_fast"] <= found["ours"]["to"]
    assert found["ours"]["times_as_fast"] == pytest.approx(3, rel=0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["vae_decode", "stages", "ar_decoding", "gpu", "train_box"])
def test_a_benchmark_that_is_asked_for_a_gpu_that_is_not_there_says_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [name, "--device", "cuda", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{name}").main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: --device cuda: torch finds no GPU")
