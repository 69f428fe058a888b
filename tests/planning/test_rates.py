"""The fit, and the committed measurements: rates in the code are those of the files, and predict what was held out."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arlon_ray.planning.counts import Work
from arlon_ray.planning.hardware import CPU, GPUS, H100, with_rates
from arlon_ray.planning.rates import Rate, fit

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = {"stages_cpu.json": CPU, "stages_h100.json": H100}


def measured(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())["stages"]


def work(case: dict[str, Any]) -> Work:
    return Work(*(case[name] for name in ("products", "attention", "traffic", "calls")))


def test_rates_that_made_the_seconds_are_found_again() -> None:
    rate = Rate(1e-11, 2e-11, 0.0, 1e-4)
    generator = np.random.default_rng(0)
    works = [Work(*map(float, generator.uniform(1, 9, 4) * (1e9, 1e8, 1e6, 10))) for _ in range(8)]
    found = fit(works, [rate.seconds(each) for each in works])
    assert astuple(found) == pytest.approx(astuple(rate), rel=1e-6, abs=1e-14)


def test_no_rate_is_negative() -> None:
    # seconds that fall with the calls
    found = fit([Work(1e9, calls=10), Work(1e9, calls=20), Work(2e9, calls=10)], [0.02, 0.01, 0.03])
    assert found.call_s == 0 and found.product_s > 0
    with pytest.raises(ValueError, match="no measurements"):
        fit([], [])


@pytest.mark.parametrize("file", FILES)
def test_what_the_fit_has_not_seen_is_predicted_within_a_fifth(file: str) -> None:
    held_out = 0
    for name, stage in measured(file).items():
        rate = Rate(**stage["rate"])
        for case in stage["cases"]:
            error = abs(rate.seconds(work(case)) / case["seconds"] - 1)
            assert error == pytest.approx(abs(case["error"]), abs=1e-6)
            if case["held_out"]:
                held_out += 1
                assert error < 0.2, (name, case["case"])
    assert held_out >= 4


@pytest.mark.parametrize("file", FILES)
def test_the_rates_are_a_fit_of_the_cases_that_are_not_held_out(file: str) -> None:
    for stage in measured(file).values():
        seen = [case for case in stage["cases"] if not case["held_out"]]
        found = fit([work(case) for case in seen], [case["seconds"] for case in seen])
        assert astuple(found) == pytest.approx(tuple(stage["rate"].values()), rel=1e-6)


@pytest.mark.parametrize("file", FILES)
def test_the_rates_in_the_code_are_those_of_the_file(file: str) -> None:
    stages = measured(file)
    assert FILES[file].rates.keys() == stages.keys()
    for name, stage in stages.items():
        assert astuple(FILES[file].rates[name]) == pytest.approx(tuple(stage["rate"].values()), rel=0.01), name


def test_a_gpu_that_was_not_measured_is_scaled_and_says_so() -> None:
    product, heavy = Work(products=1e12), Work(products=1e9, traffic=1e9, calls=100)
    a100, h200 = GPUS["a100"], GPUS["h200"]
    assert a100.seconds("dit", product) == pytest.approx(H100.seconds("dit", product) * 989 / 312)
    # the H200 has the same arithmetic and a wider memory
    assert h200.seconds("dit", product) == pytest.approx(H100.seconds("dit", product))
    assert h200.seconds("ar", heavy) < H100.seconds("ar", heavy)
    assert a100.estimated("dit") and not H100.estimated("dit") and H100.estimated("vae_decode")


def test_rates_of_a_file_take_the_place_of_those_in_the_code(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"stages": {"dit": {"rate": {"product_s": 1e-15}}}}))
    mine = with_rates(GPUS["a100"], file)
    assert mine.seconds("dit", Work(products=1e15)) == pytest.approx(1) and not mine.estimated("dit")
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"no rates as benchmarks\.stages writes them"):
        with_rates(H100, file)
