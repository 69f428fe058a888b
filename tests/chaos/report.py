"""The table of a record, as Markdown."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.chaos.record import Fault

BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
SHOWN = 150


def table(faults: Sequence[Fault]) -> str:
    """One row for each kind of fault at each target."""
    groups: dict[tuple[str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        groups[fault.target, fault.kind].append(fault)
    lines = [
        "| what | fault | times | seconds: median | most | lost | what a user saw (one of them) |",
        "|---|---|---|---|---|---|---|",
    ]
    for (target, kind), each in groups.items():
        seconds = [fault.seconds for fault in each]
        lost = sum(bool(fault.lost) for fault in each)
        example = max(each, key=lambda fault: len(fault.seen[:SHOWN]))
        lines.append(
            f"| {target} | {kind} | {len(each)} | {median(seconds):.1f} | {max(seconds):.1f} | "
            f"{lost or 'nothing'} | {_cell(example.seen)} |"
        )
    total, lost = len(faults), sum(bool(fault.lost) for fault in faults)
    lines += ["", f"{total} faults; {lost} lost something that had been acknowledged."]
    return "\n".join(lines)


def write_report(faults: Sequence[Fault], path: Path, docs: Path | None) -> None:
    """The table as a file, and between the marks of a page."""
    text = table(faults)
    path.write_text(text + "\n")
    if docs is not None:
        page = docs.read_text()
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        docs.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def _cell(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # a terminal's colours
    text = re.sub(r"/\S*/world/", "", text)  # where it lies is of this machine
    shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return shown.replace("|", "\\|").replace(os.linesep, " ")
