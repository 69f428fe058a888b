"""Who a request comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "admin"]


@dataclass(frozen=True)
class Caller:
    """Who asks. What is made belongs to a tenant: a `user` sees what is its tenant's, an `admin` everything.

    A caller without a tenant is one of its own.
    """

    name: str
    role: Role = "user"
    tenant: str = ""

    @property
    def owner(self) -> str:
        """The tenant that what it makes belongs to."""
        return self.tenant or self.name


#: Of every request where keys are off, which they may be on loopback alone.
LOCAL = Caller("local", "admin")
