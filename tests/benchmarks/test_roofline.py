"""Where parts stand in the roofline, and that the picture is drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from arlon_ray.config import load_config
from benchmarks import roofline
from benchmarks.roofline import FLOAT32, RESULTS, Point, Roof, ar_step, gpu_points, vae_point


def test_the_roof_is_memory_then_arithmetic() -> None:
    roof = Roof("one", flops_per_s=100.0, bytes_per_s=10.0)
    assert [roof.at(x) for x in (1.0, 10.0, 1000.0)] == [10.0, 100.0, 100.0]
    point = Point("part", flops=400.0, moved=20.0, seconds=8.0)
    assert point.intensity == 20.0 and point.reached == 50.0


def test_weights_that_more_rows_share_are_read_once() -> None:
    """One row reads each weight for one multiplication and one addition."""
    alone, eight = (ar_step("ar", "small", rows, 64, 1.0, FLOAT32) for rows in (1, 8))
    assert alone.intensity == pytest.approx(2 / FLOAT32, rel=0.03)
    assert eight.flops == pytest.approx(8 * alone.flops) and 6 * alone.intensity < eight.intensity < 8 * alone.intensity
    config = load_config("tiny")
    one, four = (vae_point("vae", config, True, groups, 1.0) for groups in (1, 4))
    assert four.flops == pytest.approx(4 * one.flops) and four.intensity > one.intensity


def test_the_gpu_reached_what_its_report_says() -> None:
    points = {point.name: point for point in gpu_points(json.loads((RESULTS / "gpu_h100.json").read_text()))}
    # 677 tokens/s of 1.2 milliard weights in two bytes: half of what the memory gives
    assert points["AR 1 B, batch 1"].moved * 677 == pytest.approx(0.5 * 3.03e12, rel=0.05)
    assert 200e12 < points["DiT XL/2, 240p"].reached < points["DiT XL/2, 240p, compiled"].reached < 782e12


def test_the_picture_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "cpu_points", lambda sizes, runs: iter([Point(f"part {sizes}", 8e6, 1e6, 0.01)]))
    monkeypatch.setattr(sys, "argv", ["roofline", "--sizes", "tiny", "--output", str(tmp_path / "new" / "roof.png")])
    roofline.main()
    assert (tmp_path / "new" / "roof.png").stat().st_size > 20_000
    assert "part ['tiny']: 8 FLOP/B, 0.8 GFLOP/s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["roofline", "--gpu", "/no/such.json", "--output", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as ended:
        roofline.main()
    assert ended.value.code == 2 and "there is no such file" in capsys.readouterr().err
