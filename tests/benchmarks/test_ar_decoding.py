"""AR decoding is measured at a small size, with the peer and without, and says so where it is asked for a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ar_decoding


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict:
    monkeypatch.setitem(ar_decoding.SIZES, "tiny", ({"dim": 32, "layers": 2, "heads": 2}, 16))
    common = ["--sizes", "tiny", "--tokens", "64", "--runs", "1", "--output", str(folder / "result.json")]
    monkeypatch.setattr(sys, "argv", ["ar_decoding", *common, *flags])
    ar_decoding.main()
    return json.loads((folder / "result.json").read_text())


def test_it_measures_ours_and_the_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    alone, two = measured(tmp_path, monkeypatch, "--batch", "1", "2")["cases"]
    assert (
        "error" not in alone
        and alone["weight_bytes"] > 4 * 2 * 4 * 32 * 32
        and alone["works"]["ours"]["share_of_limit"] > 0
    )
    for case in (alone, two):
        assert {"transformers", "ours", "ours, guided", "ours, a row a step"} < set(case["works"])
        assert all(work["tokens_per_s"] > 0 for work in case["works"].values())
        assert case["works"]["transformers"]["seconds"]["times_as_fast"] == 1
    assert "ours, guided" in capsys.readouterr().out


def test_the_peer_reads_our_weights() -> None:
    pytest.importorskip("transformers")
    model = ar_decoding.build("tiny", (1, 1), "cpu", torch.float32, None)
    peer = ar_decoding.build_peer(model, 64)
    assert peer.lm_head.weight.data_ptr() == model.head.weight.data_ptr()
    assert sum(p.numel() for p in peer.parameters()) * 4 - 4 * model.codes.weight.numel() == pytest.approx(
        ar_decoding.weight_bytes(model), rel=1e-3
    )
    logits = peer(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 512) and logits.isfinite().all()


def test_what_is_missing_or_fails_is_named_and_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ar_decoding, "find_spec", lambda name: None)
    monkeypatch.setitem(ar_decoding.BLOCKS, "2×4 a step", (2, 0))
    (case,) = measured(tmp_path, monkeypatch, "--batch", "1")["cases"]
    assert "error" in case
    monkeypatch.setitem(ar_decoding.BLOCKS, "2×4 a step", (2, 4))
    (late,) = measured(tmp_path, monkeypatch, "--batch", "1", "--seconds", "0")["cases"]
    assert late["error"].startswith("not measured")
    (case,) = measured(tmp_path, monkeypatch, "--batch", "1")["cases"]
    assert case["works"]["transformers"]["error"].startswith("absent") and case["works"]["ours"]["tokens_per_s"] > 0
    assert "absent: transformers is not installed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ar_decoding", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        ar_decoding.main()
    assert ended.value.code == 2 and "finds no GPU" in capsys.readouterr().err
