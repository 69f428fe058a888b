"""Running the scripts of jobs/ as `python jobs/X.py` does, but in this process: imports are paid for once."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

JOBS = Path(__file__).resolve().parents[1] / "jobs"


class Ended(NamedTuple):
    """How a script ended."""

    returncode: int
    stdout: str
    stderr: str


def run_script(name: str, *arguments: str) -> Ended:
    """Run jobs/`name`.py from its first line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    script = str(JOBS / f"{name}.py")
    with (
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", [str(JOBS), *sys.path]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())


def said(name: str, *arguments: str, code: int = 0) -> str:
    """What a script that ends with `code` prints: its output, or, where it fails, its errors."""
    ended = run_script(name, *arguments)
    assert ended.returncode == code, ended.stderr
    return ended.stderr if code else ended.stdout
