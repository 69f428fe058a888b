"""Both ways of decoding give the same video, and what they take is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from arlon_ray.bundle import load_bundle
from benchmarks import vae_decode
from tests.bundles import make_random_bundle


def test_it_measures_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(make_random_bundle(tmp_path / "b"))
    found = vae_decode.measured(bundle, 2, 1, many=10)
    assert set(found["added_by_decoding_s"]) == {"loop", "ours"} and found["largest_pixel_difference"] <= 1
    few, many = found["peak_mib"].values()
    assert 0 < few <= many < 1.05 * few
    work = vae_decode.Work(bundle, 2)
    monkeypatch.setattr(vae_decode.Work, "beside", lambda self: [frames[::-1] for frames in self.loop()])
    with pytest.raises(AssertionError, match="two ways differ"):
        vae_decode.measured(bundle, 2, 1, many=1)
    assert [len(frames) for frames in work.loop()] == [34, 17]
