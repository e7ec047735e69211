"""Finds null where the recipe's types do not allow it: jsonargparse lets it pass wherever there is a default."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Union

from jsonargparse import ArgumentParser, Namespace

from drkd.contracts import DrkdError


def refuse_nulls(parser: ArgumentParser, config: Namespace) -> None:
    """Raise a DrkdError for the first key that is null and must not be.

    Args:
        parser: What parsed the configuration.
        config: Parsed and not yet turned into objects.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.dest.endswith(".help"):
            continue
        *groups, _ = action.dest.split(".")
        for depth in range(1, len(groups) + 1):
            group = ".".join(groups[:depth])
            if group in config and config[group] is None:
                raise DrkdError(f"{group}: expected keys with values, got null. Leave it out for the defaults.")
        if action.dest in config:
            _look(config[action.dest], hint, action.dest)


def _look(value: Any, hint: Any, place: str) -> None:
    if value is None:
        if not _allows_null(hint):
            raise DrkdError(f"{place}: expected a value, got null. Leave it out for its default.")
    elif isinstance(value, Mapping | Namespace):
        entries = vars(value) if isinstance(value, Namespace) else value
        arguments, path = entries.get("init_args"), entries.get("class_path")
        if isinstance(path, str) and isinstance(arguments, Mapping | Namespace):
            hints = _hints_of(path)
            given = vars(arguments) if isinstance(arguments, Namespace) else arguments
            for name, entry in given.items():
                _look(entry, hints.get(name, Any), f"{place}.{name}")
        else:
            for name, entry in entries.items():
                _look(entry, Any, f"{place}.{name}")


def _allows_null(hint: Any) -> bool:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(_allows_null(part) for part in typing.get_args(hint))
    return hint in (None, types.NoneType, Any, object) or isinstance(hint, str | typing.TypeVar)


def _hints_of(path: str) -> dict[str, Any]:
    """Types of the arguments of a class or function; none where they cannot be told."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
        if isinstance(found, type) and not dataclasses.is_dataclass(found):
            return typing.get_type_hints(found.__init__)  # type: ignore[misc]
        return typing.get_type_hints(found)
    except Exception:  # whatever the user's module raises: it was imported, and read, once before
        return {}
