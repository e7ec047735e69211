"""YAML in which no key is given twice: of two the second would count, and the first be dropped in silence."""

from __future__ import annotations

from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader; a mapping with a key twice is an error with its line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping as it is written, before ``<<`` merges keys that may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise yaml.composer.ComposerError(
                    "while reading a mapping", node.start_mark, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def load_yaml(text: str) -> Any:
    """Read one YAML document, as ``yaml.safe_load``.

    Raises:
        yaml.YAMLError: If it is not valid, or a mapping has a key twice; ``problem`` and ``problem_mark`` say what and
            where.
    """
    return yaml.load(text, Loader=_UniqueKeys)
