"""Reads the file that joins a teacher's class names with the data's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from drkd.contracts import DrkdError
from drkd.data.unique_keys import load_yaml

BY_NAME = "names"
"""In place of a file: classes of the same name are shared, and that is all."""


def read_class_map(source: str | Path) -> dict[str, str]:
    """Read a map of the teacher's class names to the student's from YAML or JSON; ``names`` is an empty map.

    Raises:
        DrkdError: If the file cannot be read, is no flat map of names, has a name twice, or maps two classes to one.
    """
    if str(source) == BY_NAME:
        return {}
    try:
        # JSON is YAML too.
        found = load_yaml(Path(source).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DrkdError(
            f"class_map: {source} cannot be read ({' '.join(str(error).split())}). Expected a YAML or JSON file of "
            f"lines like 'automobile: car' (teacher's name: student's name), or the word {BY_NAME}."
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(v, str) for pair in found.items() for v in pair):
        raise DrkdError(
            f"class_map: {source}: expected lines like 'automobile: car' (teacher's name: student's name), got "
            f"{type(found).__name__}; put names that look like numbers, or yes and no, in quotes."
        )
    twice = sorted({name for name in found.values() if list(found.values()).count(name) > 1})
    if twice:
        raise DrkdError(
            f"class_map: {source}: several classes of the teacher's are mapped to {', '.join(twice)}; scores of "
            "classes cannot be merged, so choose one of them for each."
        )
    return dict(found)
