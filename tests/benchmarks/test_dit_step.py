"""The benchmark of the DiT's step compares two that compute the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dit_step

TINY = ["dit.depth=2", "dit.hidden_size=32", "dit.num_heads=2", "video.height=32", "video.width=32"]


def test_it_measures_steps_and_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["x", "--sizes", "tiny", "--steps", "1", "--runs", "1", "--output", str(tmp_path / "a")]
    )
    dit_step.main()
    found = json.loads((tmp_path / "a").read_text())["sizes"]["tiny"]
    assert 0 < found["relative_difference"] < dit_step.TOLERANCE and found["tokens"] == 160
    assert found["step_s"]["ours"]["times_as_fast"] > 0 and found["segment_s"]["plain"]["median"] > 0


def test_at_small_the_segments_are_the_same_too() -> None:
    comparison = dit_step.Comparison(config := dit_step.load_config("small", TINY), dit_step.random_dit(config))
    plain, ours = (comparison.sampled(step, 3) for step in (comparison.plain, comparison.ours()))
    assert (plain - ours).abs().max() < 1e-4 * plain.abs().max()
    given = config.segment.overlap_latents
    assert torch.equal(ours[:, :, :given], comparison.frozen[1][:, :, :given])


def test_it_fails_where_the_two_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit_step, "CAPTION", 0)
    with pytest.raises(ValueError, match="real tokens first"):
        dit_step.measured("tiny", 1, 1, TINY)
    monkeypatch.setattr(dit_step, "CAPTION", 10)
    monkeypatch.setattr(dit_step, "guided_step", lambda *arguments: 1.001 * plain(*arguments))
    with pytest.raises(AssertionError, match="velocities differ"):
        dit_step.measured("tiny", 1, 1, TINY)


plain = dit_step.guided_step
