"""`python -m tests.chaos --output FOLDER`: faults of every kind, drawn from a seed, and a table of what they did.

Run it again with the same folder and it goes on behind the faults that are recorded. Exit code 1 where something that
had been acknowledged was lost, or a result differed from that of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.chaos import files, hosts, preprocess, serving, training
from tests.chaos.record import Fault, Order, Record
from tests.chaos.report import write_report
from tests.chaos.world import World

#: Of one hundred faults, how many are of each kind. A target is disturbed by all of its own in one go.
TARGETS: dict[str, dict[str, int]] = {
    files.TARGET: {"latent shard": 8, "token row": 8, "checkpoint": 8, "served segment": 6, "stage artefact": 4},
    preprocess.TARGET: {
        preprocess.WORKER: 5,
        preprocess.DRIVER: 3,
        preprocess.NODE: 2,
        preprocess.PART: 2,
        preprocess.DISK: 1,
    },
    **dict.fromkeys(training.TARGETS, training.KINDS),
    serving.TARGET: {
        "AR replica": 5,
        "DiT replica": 5,
        "decoder replica": 5,
        "API replica": 3,
        "Serve controller": 3,
        "HTTP proxy": 2,
        serving.ALL: 1,
    },
    hosts.TARGET: hosts.KINDS,
}
RUNNERS: dict[str, Callable[[list[Order], World], Iterable[Fault]]] = {
    files.TARGET: files.inject_all,
    preprocess.TARGET: preprocess.inject,
    **dict.fromkeys(training.TARGETS, training.inject),
    serving.TARGET: serving.inject,
    hosts.TARGET: hosts.inject,
}


def main() -> int:
    """Command line."""
    flags = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    flags.add_argument("--output", type=Path, required=True, help="where the record and all that is worked on lie")
    flags.add_argument("--seed", type=int, default=26)
    flags.add_argument("--faults", type=int, default=100, help="about how many (default: 100)")
    flags.add_argument("--only", nargs="+", choices=sorted(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    flags.add_argument("--docs", type=Path, help="a Markdown page whose table is written anew")
    arguments = flags.parse_args()
    output = arguments.output.absolute()
    record, world = Record(output / "faults.jsonl", arguments.seed), World(output / "world")
    for target, kinds in TARGETS.items():
        if arguments.only and target not in arguments.only:
            continue
        counts = {kind: max(1, round(count * arguments.faults / 100)) for kind, count in kinds.items()}
        if orders := record.left(target, counts):
            for fault in RUNNERS[target](orders, world):
                record.note(fault)
    lost = [fault for fault in record.faults if fault.lost]
    write_report(record.faults, output / "report.md", arguments.docs)
    print(f"{len(record.faults)} faults, {len(lost)} that lost something: {output / 'report.md'}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
