"""The faults of seconds; all of them: `python -m tests.chaos`."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import files, preprocess
from tests.chaos.programs import ROOT
from tests.chaos.record import Fault, Order, Record
from tests.chaos.report import BEGIN, END, table, write_report
from tests.chaos.world import World


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("kind", files.KINDS)
def test_a_damaged_file_is_refused_or_made_again(tmp_path: Path, kind: str, number: int) -> None:
    fault = files.inject(Order(files.TARGET, kind, number, random.Random(f"{kind}{number}")), tmp_path / "files")
    assert fault.seen and not fault.lost, fault


def test_a_record_goes_on_where_it_ended(tmp_path: Path) -> None:
    kinds = {"a": 3, "b": 2}
    orders = Record(tmp_path / "faults.jsonl", 1).left("t", kinds)
    moments = {(order.kind, order.number): order.numbers.random() for order in orders}
    assert len(moments) == 5
    record = Record(tmp_path / "faults.jsonl", 1)
    for order in orders[:3]:
        record.note(Fault("t", order.kind, order.number, "now", "nothing", 1.0))
    left = Record(tmp_path / "faults.jsonl", 1).left("t", kinds)
    assert [(each.kind, each.number) for each in left] == [(each.kind, each.number) for each in orders[3:]]
    assert all(moments[order.kind, order.number] == order.numbers.random() for order in left)


def test_the_table_says_what_was_lost(tmp_path: Path) -> None:
    faults = [Fault("t", "k", n, "now", "a | b", float(n), lost="a clip" if n == 2 else "") for n in range(3)]
    assert "| t | k | 3 | 1.0 | 2.0 | 1 | a \\| b |" in table(faults)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    write_report(faults, tmp_path / "report.md", page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nbehind\n") and "old" not in text and "3 faults; 1" in text


def test_the_command_ends_with_1_where_something_was_lost(tmp_path: Path) -> None:
    record = Record(tmp_path / "faults.jsonl", 26)
    for kind, count in {"latent shard": 1, "token row": 1, "checkpoint": 1, "served segment": 1}.items():
        for number in range(count):
            record.note(Fault(files.TARGET, kind, number, "now", "nothing", 1.0, lost="a row" * (kind == "token row")))
    command = [sys.executable, "-m", "tests.chaos", "--output", str(tmp_path), "--faults", "4", "--only", files.TARGET]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "5 faults, 1 that lost something" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_dataset_is_made_in_spite_of_everything(tmp_path: Path) -> None:
    kinds = (preprocess.WORKER, preprocess.PART)
    orders = [Order(preprocess.TARGET, kind, 0, random.Random(kind)) for kind in kinds]
    faults = list(preprocess.inject(orders, World(tmp_path)))
    assert [fault.kind for fault in faults] == list(kinds) and not any(fault.lost for fault in faults), faults
