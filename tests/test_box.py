"""The weights in the box: small enough to be cloned, and good at once on captions that no training has seen."""

from __future__ import annotations

import json

import pytest

from arlon_ray.bundle import Bundle, load_bundle
from arlon_ray.evaluation.metrics import summary
from jobs.command_line import BOX
from jobs.evaluation import Evaluator, held_out_prompts, parse_row

#: What a row's videos must reach of each figure. All 64 captions of docs/results.md reach more.
SHOWS = {"object_class": 0.9, "colour": 0.9, "multiple_objects": 0.9, "action": 0.9, "presence": 0.95}


@pytest.fixture(scope="module")
def box() -> Bundle:
    return load_bundle(BOX)


def test_it_is_small_and_says_where_it_comes_from() -> None:
    files = [path for path in BOX.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20e6
    assert not [path for path in files if path.suffix not in (".safetensors", ".json", ".md")]
    assert "Apache-2.0" in (BOX / "README.md").read_text()
    for part in ("vae", "vqvae/fine", "vqvae/coarse", "ar", "dit"):
        lineage = json.loads((BOX / part / "lineage.json").read_text())
        assert len(lineage["fingerprint"]) == 64 and (lineage["parents"] or part == "vae"), part


def figures(box: Bundle, row: str, count: int, segments: int = 1) -> dict[str, float]:
    result = Evaluator(box, held_out_prompts(box, count, segments=segments), 0, segments).row(parse_row(row))
    assert len(result.metrics) == count, result.failures
    return {name: value["mean"] for name, value in summary(list(result.metrics.values())).items()}


def test_it_shows_what_captions_say(box: Bundle) -> None:
    found = figures(box, f"guided@{box.config.sampling.steps}", 20)
    assert {name: found[name] for name in SHOWS if found[name] < SHOWS[name]} == {}


def test_objects_persist_across_joins(box: Bundle) -> None:
    found = figures(box, f"guided@{box.config.sampling.steps}", 6, segments=4)
    assert found["presence"] >= 0.95 and found["persistence"] >= 0.9
    assert all(0.7 <= found[name] <= 1.3 for name in ("join_difference", "join_flow", "join_colour"))
