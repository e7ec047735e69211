"""Says which arguments of a builder in a file are not of the type that the builder declares."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union


def find_mistyped(kind: type, arguments: Mapping[str, Any]) -> str | None:
    """The first argument that does not fit its annotation, as words; None where all do.

    Args:
        kind: A dataclass; its fields are numbers, strings, choices and tuples of them.
        arguments: By name; unknown ones are left to the class itself.
    """
    hints = typing.get_type_hints(kind)
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            hint = hints[name]
            declared = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            return f"{name}: expected {declared}, got {shown(value)}"
    return None


def shown(value: Any, limit: int = 60) -> str:
    """A value for a message, cut to so many characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(entry, parts[0]) for entry in value)
        return len(value) == len(parts) and all(_fits(entry, part) for entry, part in zip(value, parts, strict=True))
    if hint in (int, bool, str):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if hint is None or hint is types.NoneType:
        return value is None
    return True
