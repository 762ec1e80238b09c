"""The base of all settings: unknown keys refused, and a value is what it is written as.

Pydantic takes ``true`` for 1 and ``"3"`` for 3. In a configuration that hides a mistake.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class CheckedModel(BaseModel):
    """Frozen settings: booleans are not numbers, texts and numbers do not stand for each other, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _what_it_is_written_as(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if problem := mistaken(field.annotation, value):
            raise PydanticCustomError("mistaken", "{problem}", {"problem": problem})
        return value


def mistaken(annotation: Any, value: Any) -> str | None:
    """What ``annotation`` needs instead of ``value``, where pydantic would convert one kind into another; else None."""
    if isinstance(value, list | tuple):
        for part in alternatives(annotation):
            kinds_of_items = [kind for kind in typing.get_args(part) if kind is not ...]
            if typing.get_origin(part) not in (list, tuple, set, frozenset) or not kinds_of_items:
                continue
            for at, item in enumerate(value):
                if problem := mistaken(kinds_of_items[min(at, len(kinds_of_items) - 1)], item):
                    return problem
        return None
    if not isinstance(value, bool | int | float | str):
        return None
    kinds: set[Any] = set()
    for part in alternatives(annotation):
        if typing.get_origin(part) is Literal:
            kinds |= {type(choice) for choice in typing.get_args(part)}
        elif part in (bool, int, float, str):
            kinds.add(part)
        else:
            return None  # a type of its own, which says itself what it takes
    kinds.discard(type(None))
    if type(value) in kinds or (
        isinstance(value, int | float) and not isinstance(value, bool) and kinds & {int, float}
    ):
        return None
    words = {bool: "boolean", int: "integer", float: "number", str: "string"}
    needed = [words[kind] for kind in (bool, int, float, str) if kind in kinds]
    return "input should be a valid " + " or ".join(needed) if needed else None


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, those of nested ones included."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in alternatives(member)]
    if origin is typing.Annotated:
        return alternatives(typing.get_args(annotation)[0])
    return [] if annotation is type(None) else [annotation]


def short(value: Any) -> str:
    """A value as messages quote it: on one line, as TOML would write it, cut where it is long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
        return "a nested list"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
