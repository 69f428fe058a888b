"""`make bench`: every part's benchmark on this CPU, its comparisons in one table, and all figures in one JSON.

Each part runs in a process of its own. A comparison is any figure with `times_as_fast`: works that took turns, against
the first of them, which the table names. `--short` takes a minute; `--against FILE …` warns, and no more, where a
comparison has fallen by 15 % since that file was written, or is not there any more: ratios, because times of another
hour say nothing; and with the file of a processor like this one, because ratios differ too. What is of a peer alone is
not watched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

#: Of each part: its arguments for `make bench`, and for the short form (None: left out of it).
PARTS: dict[str, tuple[str, str | None]] = {
    "ar_decoding": (
        "--sizes tiny small --batch 1 8 --tokens 256 --runs 3 --seconds 240",
        "--sizes tiny --batch 1 --tokens 128 --runs 3 --seconds 60",
    ),
    "dit_step": ("--sizes tiny small", "--sizes tiny --runs 5 --steps 2"),
    "vae_decode": ("--bundle {bundle} --segments 4 --runs 5", None),
    "generation": ("--bundle {bundle} --runs 5", None),
    "growth": ("--bundle {bundle} --runs 3", None),
    "startup": ("--bundle {bundle} --runs 3 --depth 4", None),
}
#: How names of others' works begin, and of formulas as they are written by others.
PEERS = ("transformers", "plain")
#: A comparison that is below this share of what it was is worth a warning.
FALLEN = 0.85


Where = tuple[str, ...]  # of something within the figures


def parts_of(values: Any, path: Where = ()) -> Iterator[tuple[Where, Mapping[str, Any]]]:
    """(path, mapping) of every mapping in `values`."""
    if isinstance(values, Mapping):
        yield path, values
        for name, value in values.items():
            yield from parts_of(value, (*path, str(name)))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            named = isinstance(value, Mapping) and "size" in value
            name = f"{value['size']}, batch {value.get('batch')}" if named else str(number)
            yield from parts_of(value, (*path, name))


def comparisons(values: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {times_as_fast, from, to, base}) of everything in `values` that was measured against something else."""
    for path, its in parts_of(values):
        if its.get("times_as_fast", 1.0) != 1.0:  # 1: what the others are compared with
            yield _named(path), {name: its.get(name) for name in ("times_as_fast", "from", "to", "base")}


def missing(values: Any) -> dict[str, str]:
    """Why what is not there is not: peers that are absent, works that failed, what there was no time for."""
    return {_named(path): str(its["error"]).splitlines()[-1] for path, its in parts_of(values) if its.get("error")}


def _named(path: Where) -> str:
    return " · ".join(part for part in path if part not in ("cases", "works", "seconds", "sizes"))


def measure(part: str, arguments: str, folder: Path) -> dict[str, Any]:
    """Run one part; what went wrong with it is its result."""
    file, begin = folder / f"{part}.json", time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{part}", *arguments.split(), "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if done.returncode:
        found["error"] = done.stderr.strip()[-1000:]
    return found | {"took_s": time.perf_counter() - begin}


def table(found: Mapping[str, Mapping[str, Any]], absent: Mapping[str, str]) -> str:
    """Markdown."""
    lines = ["| comparison | with | times as fast | from–to |", "|---|---|---|---|"]
    for name, its in found.items():
        spread = f"{its['from']:.2f}–{its['to']:.2f}"
        lines.append(f"| {name} | {its['base']} | {its['times_as_fast']:.2f} | {spread} |")
    return "\n".join([*lines, *(f"| {name} | – | {why} | – |" for name, why in absent.items())])


def fallen(result: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """A line for each comparison that is worse than it was, beyond its own spread, or gone from a part that ran."""
    now, lines = result["comparisons"], []
    for name, its in before["comparisons"].items():
        part, own = name.split(" · ")[0], name.split(" · ")[-1]
        if part not in result["parts"] or own.startswith(PEERS):
            continue
        was, base = its["times_as_fast"], its.get("base")  # files of before do not say over what
        if name not in now or base not in (None, now[name]["base"]):
            lines.append(f"warning: {name}: not compared with {base or 'the same'} any more; it was {was:.2f}")
        elif (ratio := now[name]["times_as_fast"]) < FALLEN * was and now[name]["to"] < was:
            lines.append(f"warning: {name}: {ratio:.2f} times as fast; it was {was:.2f}")
    return sorted(lines)


def against(result: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has `fallen` since that of the earlier results which was measured on such a processor."""
    cpu, flags = result["machine"]["cpu"], result["machine"].get("cpu_flags")
    # names of virtual machines say little; files of before do not know the processor's instructions
    alike = [
        each for each in earlier
        if each["machine"]["cpu"] == cpu and each["machine"].get("cpu_flags") in (None, flags)
    ]  # fmt: skip
    if not alike:
        known = ", ".join(each["machine"]["cpu"] for each in earlier)
        return [f"nothing to compare with: this is {cpu}, what is there was measured on {known}"]
    return fallen(result, alike[0])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--bundle", default="weights/tiny", metavar="DIR")
    flags.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    flags.add_argument("--short", action="store_true", help="the parts that have a short form, in it")
    flags.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE", help="of earlier results")
    flags.add_argument("--output", type=Path, metavar="FILE")
    options = flags.parse_args(arguments)
    result: dict[str, Any] = {"machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            words = PARTS[part][1 if options.short else 0]
            if words is None:
                continue
            result["parts"][part] = measured = measure(part, words.format(bundle=options.bundle), Path(folder))
            said = f": {measured['error'].splitlines()[-1]}" if measured.get("error") else ""
            print(f"{part}: {measured['took_s']:.0f} s{said}", flush=True)
    result["comparisons"] = dict(comparisons(result["parts"]))
    print(f"\n{table(result['comparisons'], missing(result['parts']))}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    if options.against:
        print("\n".join(against(result, [json.loads(file.read_text()) for file in options.against])))
    return result


if __name__ == "__main__":
    if any("error" in part for part in main()["parts"].values()):
        raise SystemExit(1)
