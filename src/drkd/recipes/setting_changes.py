"""What has changed between two resolved recipes, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Where a run writes and how it starts says nothing about what it measures.
_FOLDER = ("output", "resume", "overwrite", "doctor")


def without_folder(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run's results depend on."""
    return {key: value for key, value in settings.items() if key not in _FOLDER}


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any], *, stated: Iterable[str]) -> list[str]:
    """Say which settings are not what they were, as words: "training.steps was 400, is 200".

    A key that was not recorded is an option that drkd has got since; it counts only where it is stated.

    Args:
        recorded: Settings then.
        now: Settings now.
        stated: Dotted keys that somebody states now.
    """
    then, present, said = leaves(recorded), leaves(now), {plain_key(key) for key in stated}
    words = [
        f"{key} was {then[key]!r}, is {present[key]!r}" if key in present else f"{key} was {then[key]!r}, is gone"
        for key in then
        if key not in present or then[key] != present[key]
    ]
    return words + [f"{key} is new: {present[key]!r}" for key in present if key not in then and key in said]


def leaves(content: Mapping[str, Any], prefix: str = "", *, plain: bool = True) -> dict[str, Any]:
    """Values by dotted key; ``plain`` drops ``init_args`` from the keys, see `plain_key`."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found.update(leaves(value, f"{prefix}{key}.", plain=plain))
        else:
            name = f"{prefix}{key}"
            found[plain_key(name) if plain else name] = value
    return found


def plain_key(key: str) -> str:
    """Without init_args: ``student.width`` and ``student.init_args.width`` are one key."""
    return key.replace(".init_args", "")
