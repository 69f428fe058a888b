"""Passes: what an address carries where no header can be sent, as that of a `<video>` or an `<img>`.

A pass reads finished files (`…/content`) as the key that it was made with does, for an hour, and does nothing else. It
names that key and its own end, and a secret of this process signs both. Nothing of it is kept: it is over with the key,
and with the process.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from urllib.parse import parse_qs

#: How long a pass is good.
PASS_S = 3600

_PASS = re.compile(r"([0-9a-f]{12})\.(\d{1,12})\.([0-9a-f]{64})", re.ASCII)
_FILE = re.compile(r"/v1/(?:videos|drafts)/[^/]+/content")


class Passes:
    """Makes passes, and says whose they are."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._secret = clock, secrets.token_bytes(32)

    def make(self, prefix: str) -> str:
        """A pass of the key with that prefix."""
        end = int(self._clock()) + PASS_S
        return f"{prefix}.{end}.{self._signature(prefix, end)}"

    def prefix(self, given: str) -> str | None:
        """The prefix of the key that it was made with; None for one that is over, or none of ours."""
        match = _PASS.fullmatch(given)
        if match is None or int(match[2]) <= self._clock():
            return None
        return match[1] if hmac.compare_digest(match[3], self._signature(match[1], int(match[2]))) else None

    def _signature(self, prefix: str, end: int) -> str:
        return hmac.new(self._secret, f"{prefix}.{end}".encode(), hashlib.sha256).hexdigest()


def pass_in(method: str, path: str, query: bytes) -> str | None:
    """The pass in a request for a file; None in any other, for there it says nothing, or where there are several."""
    if method not in ("GET", "HEAD") or not _FILE.fullmatch(path):
        return None
    found = parse_qs(query.decode("latin-1")).get("pass", [])
    return found[0] if len(found) == 1 else None
