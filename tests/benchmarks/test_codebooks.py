"""How much of a bundle's codebooks is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.codebooks import main
from tests.bundles import make_random_bundle


def test_use_of_a_bundles_own_codebooks(tmp_path: Path) -> None:
    bundle = make_random_bundle(tmp_path / "bundle")
    written = tmp_path / "use.json"
    main(["--bundle", str(bundle), "--scenes", "3", "--output", str(written)])
    result = json.loads(written.read_text())
    assert result["scenes"] == 3 and set(result["used"]) == {"fine", "coarse"}
    for codec in result["used"].values():
        assert (
            0 < codec["codebook_used"] <= 1 and codec["codebook_used"] * codec["codes"] >= codec["codebook_perplexity"]
        )


def test_it_wants_data_or_a_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--steps", "3"])
    assert ended.value.code == 2 and "--dataset --bundle" in capsys.readouterr().err
