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
        return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value
    return value.expanduser() if isinstance(value, Path) and value.parts[:1] == ("~",) else value
