"""Who a request comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "admin"]


@dataclass(frozen=True)
class Caller:
    """The owner of what is made: a `user` sees its own videos, an `admin` all of them."""

    name: str
    role: Role = "user"


#: Of every request where keys are off, which they may be on loopback alone.
LOCAL = Caller("local", "admin")
