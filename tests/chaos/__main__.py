"""`python -m tests.chaos --output FOLDER`: faults of every kind, drawn from a seed, and a table of what they did.

Run it again with the same folder and it goes on behind the faults that are recorded. Exit code 1 where something that
had been acknowledged was lost, a result differed from that of a run that nobody disturbed, or a target did not finish.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.chaos import files, hosts, preprocess, serving, training
from tests.chaos.record import Fault, Order, Record
from tests.chaos.report import write_report
from tests.chaos.world import World

#: Of one hundred faults, how many are of each kind. A target is disturbed by all of its own in one go.
TARGETS: dict[str, dict[str, int]] = {
    files.TARGET: {"latent shard": 14, "token row": 16, "checkpoint": 16, "served segment": 12, "stage artefact": 10},
    preprocess.TARGET: {
        preprocess.WORKER: 4,
        preprocess.DRIVER: 2,
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
#: Ray's patience with processes that get little of the machine: a node that is slow is no fault of ours.
PATIENT = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_failure_threshold": "10",
    "RAY_agent_register_timeout_ms": "300000",
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
    os.environ.update(PATIENT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended too
    output = arguments.output.absolute()
    record, world = Record(output / "faults.jsonl", arguments.seed), World(output / "world")
    broken: list[str] = []
    for target, kinds in TARGETS.items():
        if arguments.only and target not in arguments.only:
            continue
        counts = {kind: max(1, round(count * arguments.faults / 100)) for kind, count in kinds.items()}
        try:
            for fault in RUNNERS[target](orders, world) if (orders := record.left(target, counts)) else ():
                record.note(fault)
        except Exception as error:  # the other targets can be disturbed all the same
            traceback.print_exc()
            broken.append(f"{target}: {type(error).__name__}")
    lost = [fault for fault in record.faults if fault.lost]
    write_report(record.faults, output / "report.md", arguments.docs)
    print(f"{len(record.faults)} faults, {len(lost)} that lost something: {output / 'report.md'}")
    for text in broken:
        print(f"not finished: {text}; run it again to go on", file=sys.stderr)
    return 1 if lost or broken else 0


if __name__ == "__main__":
    sys.exit(main())
