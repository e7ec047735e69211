"""Paths that begin with a user's home, which shells do not expand after an equals sign nor in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace


def expand_home(value: Any) -> Any:
    """Put the home folder for a leading ``~/`` of every path and text of what was parsed; namespaces are changed."""
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, expand_home(item))
        return value
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    if isinstance(value, str):
        return str(_expanded(Path(value))) if value == "~" or value.startswith("~/") else value
    return _expanded(value) if isinstance(value, Path) and value.parts[:1] == ("~",) else value


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # a container's user without an entry of its own
        from drkd.contracts import DrkdError  # with torch, which help does not wait for

        raise DrkdError(
            f"{path}: the home folder is not known ({error}). Set HOME, or write the whole path."
        ) from error
