"""Quality against the share of wrong tokens, of several DiTs side by side.

`python -m benchmarks.wrong_tokens --variants NAME=RESULTS … --output wrong_tokens_anew.json --plot PNG`
puts together what `jobs/evaluate.py --rows true-tokens@5 true-tokens@5:wrong=0.1 …` has measured of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from jobs.command_line import InputError, existing, parser, run
from jobs.results_page import plot_wrong_tokens

#: What the picture shows.
SHOWN = ("subject_consistency", "object_class", "spatial_relationship", "action")


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="wrong_tokens.json", config=False)
    flags.add_argument("--variants", nargs="+", required=True, metavar="NAME=RESULTS", help="results.json of each")
    flags.add_argument("--what", default="", help="how they were trained and measured: goes into the file")
    flags.add_argument("--plot", type=Path, metavar="PNG")
    arguments = flags.parse_args()
    found, output = [_measured(text) for text in arguments.variants], Path(arguments.output)
    if len({each["variant"] for each in found}) < len(found):
        raise InputError("--variants: expected another NAME for each")
    if arguments.plot and not plot_wrong_tokens(arguments.plot, found, SHOWN):
        raise InputError("--variants: none has rows true-tokens@5 and true-tokens@5:wrong=SHARE, three at least")
    made = {"what": arguments.what, "put_together_on": machine()}
    made["variants"] = {each["variant"]: each["rows"] for each in found}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(made, indent=2) + "\n")
    print(output)


def _measured(text: str) -> dict[str, Any]:
    name, _, path = text.partition("=")
    if not path:
        raise InputError(f"--variants {text}: expected NAME=RESULTS")
    try:
        return {"variant": name, "rows": json.loads(existing(path, "--variants").read_text())["rows"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"--variants {text}: expected a results.json of jobs/evaluate.py") from None


if __name__ == "__main__":
    run(main)
