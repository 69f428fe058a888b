"""The base of every configuration section: frozen, and strict about names and types."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen configuration section. Unknown keys and wrong types are errors, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
