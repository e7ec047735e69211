"""Recipe files: found by path or by shipped name, and read after the file that they name as their base."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from drkd.contracts import DrkdError
from drkd.data.unique_keys import load_yaml
from drkd.recipes.builtin import builtin_recipe, list_builtin, list_comparisons
from drkd.recipes.recipe_error import readable

_BASE = "base"


class RecipeFile(ActionConfigFile):
    """The ``--config`` option: applies a recipe's bases first, then the recipe.

    A recipe may begin with ``base: other.yaml`` (relative to itself, or the name of a shipped recipe, or a list of
    them); what it states changes what the base states, exactly as a second ``--config`` would.
    """

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        """Apply one ``--config`` (called by jsonargparse)."""
        for path, content in recipe_chain(value):
            if "pairs" in content:
                raise DrkdError(f"{path}: this is a comparison, not a recipe; run it with drkd compare.")
            try:
                ActionConfigFile.apply_config(parser, cfg, dest, yaml.safe_dump(content))
            except DrkdError:
                raise
            except Exception as error:
                # jsonargparse raises errors of many kinds here, and every one is about what the file says.
                raise DrkdError(f"{path}: {readable(error, parser)}") from error


def find_recipe(name: str | Path, *, beside: Path | None = None) -> Path:
    """Path of a recipe that is named by its path or, if no such file exists, by the name of a shipped one.

    Args:
        name: The path or name.
        beside: Folder that a relative path is relative to; the working directory by default.

    Raises:
        DrkdError: If there is neither.
    """
    path = (beside or Path()) / Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise DrkdError(f"{path} is a folder; expected a recipe file in YAML.")
    try:
        return builtin_recipe(str(name))
    except DrkdError:
        raise DrkdError(
            f"There is no recipe file {path}, and drkd ships none of that name. It ships: "
            f"{', '.join([*list_builtin(), *list_comparisons()])}."
        ) from None


def recipe_chain(name: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read a recipe and its bases: path and content of each without its ``base`` key, the most basic first.

    Raises:
        DrkdError: If a file is missing, is no YAML mapping, or is its own base.
    """
    return _chain(find_recipe(name), ())


def _chain(path: Path, above: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    resolved = path.resolve()
    if resolved in above:
        raise DrkdError(f"{path}: the recipe is its own base, by way of {' -> '.join(p.name for p in above)}.")
    content = _read(path)
    bases = content.pop(_BASE, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise DrkdError(f"{path}: base: expected the name of a recipe file or a list of them, got {bases!r}.")
    chain: list[tuple[Path, dict[str, Any]]] = []
    for base in bases:
        chain += _chain(find_recipe(base, beside=path.parent), (*above, resolved))
    return [*chain, (path, content)]


@lru_cache(maxsize=64)
def _parse(text: str) -> Any:
    """What YAML says; a comparison reads the same few recipes a hundred times. Callers must not change it."""
    return load_yaml(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = copy.deepcopy(_parse(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise DrkdError(f"{path}: not valid YAML: {where}{getattr(error, 'problem', None) or error}.") from error
    except OSError as error:
        raise DrkdError(f"{path}: cannot be read ({error.strerror}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise DrkdError(f"{path}: expected a recipe (keys with values), got {type(content).__name__}.")
    return content
