"""The base of every configuration section: frozen, and strict about names and types."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen configuration section. Unknown keys and wrong types are errors, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def without_effect(self) -> set[str]:
        """Names of the settings that, as these are, change nothing that is trained: no part of a fingerprint.

        What came later and is off is among them: what was made before there was any goes on.
        """
        return set()

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for 1 and "5" for 5. (Text stays good for a float: YAML 1.1 reads 1e-3 as text.)"""
        kinds = _scalars(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float} and bool not in kinds:
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, bool):
                    raise PydanticCustomError("number", "Input should be a number, not true or false")
                if isinstance(number, str) and not kinds & {float, str}:
                    raise PydanticCustomError("number", "Input should be a whole number, not text")
        return value


def _scalars(annotation: Any) -> set[type]:
    """The types of the plain values of a field, also inside tuples, alternatives and literals."""
    inner = get_args(annotation)
    if not inner:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return {kind for part in inner for kind in _scalars(part)}
