"""Where tenants' files lie: beside each other in the service's folder or bucket, or in a place of their own."""

from __future__ import annotations

from collections.abc import Mapping

from arlon_ray.config import TenantConfig
from serve.blobs import Blobs
from serve.callers import Caller

FOLDER = "tenants"  # of those that have no place of their own


class Places:
    """The place of each tenant. A job says whose place it lies in, not where that is: a place can be moved."""

    def __init__(self, root: Blobs, tenants: Mapping[str, TenantConfig] | None = None) -> None:
        """`root` is the service's. Raises ValueError for a `data_dir` that cannot be opened."""
        self._root = root
        named = {name: settings.data_dir for name, settings in (tenants or {}).items()}
        self._own = {name: Blobs(place) for name, place in named.items() if place}

    def tenant(self, caller: Caller) -> str:
        """Whose place takes what a caller makes; empty: the service's, for callers without a tenant."""
        return caller.tenant or (caller.name if caller.name in self._own else "")

    def of(self, tenant: str) -> Blobs:
        """The place of one."""
        if not tenant:
            return self._root
        return self._own[tenant] if tenant in self._own else self._root.below(f"{FOLDER}/{tenant}")

    def all(self) -> list[Blobs]:
        """Every place that there is."""
        shared = [name for name in self._root.folders(FOLDER) if name not in self._own]
        return [self._root, *self._own.values(), *(self.of(name) for name in shared)]
