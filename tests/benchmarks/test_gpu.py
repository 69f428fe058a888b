"""The GPU script runs where there is none, at a small size, and says so where it is asked for one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_training import flops_of, training_speed


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str) -> dict[str, Any]:
    """Its JSON."""
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--small", "--output", str(folder), *flags])
    gpu.main()
    return json.loads((folder / "gpu.json").read_text())


#: What a machine with torch and einops alone has not.
ABSENT = ("ray", "deepspeed", "pyarrow", "transformers", "diffusers", "av", "cv2", "decord", "mlflow", "matplotlib")


def test_it_measures_all_but_training_without_ray_data_or_encoders(tmp_path: Path) -> None:
    code = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); from benchmarks.gpu import main; main()"
    cases_but = sorted(set(gpu.CASES) - {"training", "ar"})
    flags = ["--device", "cpu", "--small", "--output", str(tmp_path), "--cases", *cases_but]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-500:]
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert set(cases) == {
        "ceilings",
        "sampling, 240p",
        "sampling, 720p",
        "videos, small",
        "loading",
        "offload",
        "attention",
    }
    assert not [name for name, its in cases.items() if "error" in its]
    step = cases["sampling, 240p"]
    assert step["equal"] and step["relative_error_float32"] < 1e-5 and step["tokens"] == 10 * 3 * 4
    assert step["step_s"]["ours"]["median"] > 0 and cases["loading"]["load_s"] > 0
    assert set(cases["videos, small"]["video_s"]) == {"text-only@2", "guided@1"}
    assert cases["offload"]["equal"] and cases["offload"]["idle"]["video_s"]["median"] > 0
    assert 0 < cases["videos, small"]["busy_shares"]["guided@1"]["ar"] < 1
    assert cases["ceilings"]["matmul_tflops_per_s"] > 0 and cases["attention"]["space, 240p"]["flash"]["both_s"] > 0


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_it_measures_the_training_step(weights: torch.dtype, compiled: bool) -> None:
    if compiled and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    found: dict[str, Any] = {}
    training_speed(gpu.SMALL_SIZES["240p"], True, "cpu", weights, compiled, 1, found.__setitem__)
    assert set(found) == {"nothing recomputed", "all blocks recomputed"}
    for its in found.values():
        assert 0 < its["mfu"] < 1 and its["compiled"] is compiled and its["step_s"]["median"] > 0


def test_the_operations_are_those_of_the_layers() -> None:
    """Of 240p: products with weights and attention, forward and twice backward (the rest is below two hundredths)."""
    tokens, places, frames, width = 15 * 15 * 27, 15 * 27, 15, 1152
    pair = 2 * 28 * width**2 + 4 * width * (places + frames + 2 * 300)
    assert flops_of(240, 424, 3, False) == pytest.approx(3 * 28 * tokens * pair, rel=0.02)


def test_what_fails_is_reported_and_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "attention_kernels", fails)
    result = run(monkeypatch, tmp_path, "--cases", "attention", "ceilings")
    assert "no such kernel" in result["cases"]["attention"]["error"] and "error" not in result["cases"]["ceilings"]
    assert run(monkeypatch, tmp_path, "--cases", "loading", "--seconds", "0")["skipped"] == ["loading"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2 and "finds no GPU" in capsys.readouterr().err
