"""The typed comparison: what one YAML file says about pairs, methods and seeds."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from drkd.contracts import DrkdError
from drkd.recipes.builtin import builtin_recipe
from drkd.recipes.home import expand_home
from drkd.recipes.null_values import refuse_nulls
from drkd.recipes.recipe_error import readable
from drkd.recipes.recipe_file import find_recipe, recipe_chain

TEACHER = "teacher"
"""Name of the teacher's row; no method may have it."""

_ALONE = (None, "train")
# As in recipes. Inside they are called otherwise: jsonargparse would build what has a class_path.
_ARM_KEYS = {"class_path": "method", "init_args": "arguments", "overrides": "overrides", "pairs": "pairs"}
_SHIELD = "shielded_"
_PAIR_KEYS = {"recipe": "recipe", "overrides": "overrides"}
_OVERRIDE = "--overrides."
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
# What the comparison itself decides for every cell.
_DECIDED = {
    "seed": "seeds",
    "output": "output",
    "evaluation.split": "split",
    "resume": "nothing: cells go on by themselves",
    "overwrite": "nothing: use --rerun",
}


@dataclass(frozen=True)
class Pair:
    """A student with its teacher on some data: a recipe.

    Args:
        recipe: Recipe file, relative to the comparison's file, or the name of a shipped recipe.
        overrides: Keys of the recipe to change, nested or dotted.
    """

    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A way to train the students of all pairs, or of some.

    Args:
        method: Import path of a KDMethod (``class_path`` in the file); None trains the student alone.
        arguments: Its arguments (``init_args``); nothing is taken over from the pair's recipe.
        overrides: Keys of the recipe to change for this method, nested or dotted.
        pairs: The pairs that it is for; None: all.
    """

    method: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    pairs: list[str] | None = None


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Args:
        pairs: By name, what is compared on: a recipe, or a recipe with overrides.
        methods: By name, "train" (or null) for the student alone, the import path of a method, or class_path,
            init_args and overrides, and the pairs that it is for, where it is not for all.
        output: Folder of the cells, their runs and the report.
        seeds: Every method runs once with each; differences are paired by them.
        split: Split that every cell and the teacher are scored on, once, at the end.
        overrides: Keys of the recipe to change in all cells, nested or dotted; ``--overrides.training.steps=3``.
        jobs: Cells at a time; each is a process with its share of the threads.
        reference: Method that the others are compared with.
    """

    pairs: dict[str, Pair]
    methods: dict[str, Arm]
    output: Path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    split: str = "val"
    overrides: dict[str, Any] = field(default_factory=dict)
    jobs: int = 1
    reference: str = "student"


class ComparisonFile(ActionConfigFile):
    """The ``--config`` option: reads a comparison after its bases and spells its short forms out."""

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        """Apply one ``--config`` (called by jsonargparse)."""
        merged: dict[str, Any] = {}
        chain = recipe_chain(value)
        for path, content in chain:
            spelled = _spell_out(content, path)
            _drop_replaced(merged, spelled)
            _merge(merged, spelled)
        try:
            ActionConfigFile.apply_config(parser, cfg, dest, yaml.safe_dump(merged, sort_keys=False))
        except DrkdError:
            raise
        except Exception as error:
            # jsonargparse raises errors of many kinds here, and every one is about what the file says.
            raise DrkdError(f"{chain[-1][0]}: {readable(error, parser)}") from error
        # Messages name the file; jsonargparse notes None, since it was given the text.
        cfg[dest][-1] = str(chain[-1][0])


class _ComparisonParser(ArgumentParser):
    """Adds up options such as ``--overrides.training.steps=3``; jsonargparse would keep the last of a group only."""

    def parse_args(  # type: ignore[override]  # jsonargparse departs from argparse too
        self,
        args: Sequence[str] | None = None,
        namespace: Namespace | None = None,
        env: bool | None = None,
        defaults: bool = True,
        **settings: Any,
    ) -> Namespace:
        """Parse, then put the overrides of the command line over those of the file."""
        given = list(sys.argv[1:] if args is None else args)
        rest: list[str] = []
        stated: dict[str, Any] = {}
        while given:
            word = given.pop(0)
            if not word.startswith(_OVERRIDE):
                rest.append(word)
                continue
            key, equals, value = word.removeprefix(_OVERRIDE).partition("=")
            stated[key] = _shield(_read_value(key, value if equals else given.pop(0) if given else "null"))
        config = super().parse_args(rest, namespace, env, defaults, **settings)
        if stated:
            config["overrides"] = {**flatten(config["overrides"]), **stated}
        return config


def _read_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise DrkdError(f"{_OVERRIDE}{key}: expected a value in YAML, got {text!r} ({problem}).") from error


def comparison_parser(description: str = "", **settings: Any) -> ArgumentParser:
    """Build the parser of a comparison: every field is both a YAML key and a command-line option."""
    parser = _ComparisonParser(description=description, **settings)
    parser.add_argument(
        "--config",
        action=ComparisonFile,
        help="Comparison file, or the name of a shipped comparison (compare/digits). Options override what it says.",
    )
    parser.add_class_arguments(Comparison)
    return parser


def instantiate(parser: ArgumentParser, config: Namespace) -> Comparison:
    """Turn a parsed comparison into objects and check what no type can say.

    Raises:
        DrkdError: Naming file and field.
    """
    try:
        refuse_nulls(parser, config)
    except DrkdError as error:
        raise DrkdError(f"{source_of(config)}: {error}") from None
    expand_home(config)
    built = parser.instantiate(config)
    comparison = Comparison(**{item.name: built[item.name] for item in fields(Comparison)})
    comparison = replace(
        comparison,
        overrides=_unshield(comparison.overrides),
        pairs={name: replace(pair, overrides=_unshield(pair.overrides)) for name, pair in comparison.pairs.items()},
        methods={
            name: replace(arm, arguments=_unshield(arm.arguments), overrides=_unshield(arm.overrides))
            for name, arm in comparison.methods.items()
        },
    )
    _check(comparison, source=source_of(config))
    return comparison


def source_of(config: Namespace) -> str:
    """The file that a parsed comparison comes from, for messages."""
    return str((config.get("config") or ["the command line"])[-1])


def load_comparison(file: Path | str, overrides: Sequence[str] = ()) -> Comparison:
    """Read a comparison file, then overrides such as ``--jobs=2``.

    Raises:
        DrkdError: If the file is missing, or a key or a value is wrong.
    """
    parser = comparison_parser(exit_on_error=False)
    try:
        config = parser.parse_args([f"--config={file}", *overrides])
    except DrkdError:
        raise
    except Exception as error:
        raise DrkdError(f"The comparison {file} cannot be used: {readable(error, parser)}") from error
    return instantiate(parser, config)


def nearest(name: str, known: Sequence[str]) -> str:
    """Words that help with a name that is none of the known ones."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(known)}."


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested keys as dotted ones; a class with its arguments stays whole."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and not {"class_path", _SHIELD} & value.keys():
            found.update(flatten(value, f"{name}."))
        else:
            found[name] = value
    return found


def _shield(value: Any) -> Any:
    """Keep jsonargparse from reading what is a recipe's to read: it builds classes, and takes the string off for False.

    Undone by `_unshield`: strings and the key class_path, at every depth.
    """
    if isinstance(value, Mapping):
        return {_SHIELD if key == "class_path" else key: _shield(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_shield(entry) for entry in value]
    return _SHIELD + value.encode().hex() if isinstance(value, str) else value


def _unshield(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"class_path" if key == _SHIELD else key: _unshield(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unshield(entry) for entry in value]
    is_shielded = isinstance(value, str) and value.startswith(_SHIELD)
    return bytes.fromhex(value.removeprefix(_SHIELD)).decode() if is_shielded else value


def _drop_replaced(merged: dict[str, Any], spelled: Mapping[str, Any]) -> None:
    """Empty the bases' pairs and methods of which a file says anew what they are; they keep their places."""
    for kind in ("pairs", "methods"):
        for name, entry in spelled.get(kind, {}).items():
            if name in merged.get(kind, {}) and {"recipe", "method"} & entry.keys():
                merged[kind][name] = {}


def _merge(into: dict[str, Any], content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _spell_out(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write short forms as mappings, and the pairs' recipes relative to where the comparison is read from."""
    known = [item.name for item in fields(Comparison)]
    for key in content:
        if key in ("student", "data", "training", "teacher") and key not in known:
            raise DrkdError(
                f"{path}: this is a recipe, not a comparison: it says '{key}'. A comparison names recipes under "
                "pairs; see drkd compare --help."
            )
        if key not in known:
            raise DrkdError(f"{path}: there is no such key as '{key}'{nearest(str(key), known)}")
    spelled = dict(content)
    if "overrides" in content:
        spelled["overrides"] = _shield(content["overrides"])
    for key in ("pairs", "methods"):
        if key in content:
            entries = content[key]
            if not isinstance(entries, Mapping) or not entries:
                raise DrkdError(f"{path}: {key}: expected names with what they stand for, got {entries!r}.")
            one = _spell_pair if key == "pairs" else _spell_arm
            spelled[key] = {str(name): one(entry, path, f"{key}.{name}") for name, entry in entries.items()}
    return spelled


def _spell_pair(entry: Any, path: Path, place: str) -> dict[str, Any]:
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    entry = _check_entry(entry, _PAIR_KEYS, path, place, short="the name of a recipe")
    if not isinstance(entry.get("recipe"), str):
        raise DrkdError(f"{path}: {place}.recipe: expected the name of a recipe, got {entry.get('recipe')!r}.")
    name = entry["recipe"]
    try:
        found = find_recipe(name, beside=path.parent)
        # A shipped recipe keeps its name: its path is this machine's.
        is_shipped = not (path.parent / Path(name).expanduser()).is_file() and found == builtin_recipe(name)
    except DrkdError as error:
        raise DrkdError(f"{path}: {place}.recipe: {error}") from None
    return {**entry, "recipe": name if is_shipped else str(found)}


def _spell_arm(entry: Any, path: Path, place: str) -> dict[str, Any]:
    entry = {"class_path": entry} if isinstance(entry, str | None) else entry
    if isinstance(entry, Mapping) and entry.get("class_path", "") in _ALONE:
        # Stated, not left out: it replaces the method of a base.
        entry = {**entry, "class_path": None}
    return _check_entry(entry, _ARM_KEYS, path, place, short="train or the import path of a method")


def _check_entry(entry: Any, keys: Mapping[str, str], path: Path, place: str, *, short: str) -> dict[str, Any]:
    """Check the keys of an entry and give them their inner names."""
    known = list(keys)
    if not isinstance(entry, Mapping):
        raise DrkdError(f"{path}: {place}: expected {short}, or {', '.join(known)}; got {entry!r}.")
    for key in entry:
        if key not in known:
            raise DrkdError(f"{path}: {place}: there is no such key as '{key}'{nearest(str(key), known)}")
        if key in ("init_args", "overrides") and not isinstance(entry[key], Mapping):
            raise DrkdError(f"{path}: {place}.{key}: expected keys with values, got {entry[key]!r}.")
        if key == "class_path" and not isinstance(entry[key], str | None):
            raise DrkdError(f"{path}: {place}.{key}: expected an import path, got {entry[key]!r}.")
    spelled = {
        keys[key]: _shield(value) if key in ("init_args", "overrides") else value for key, value in entry.items()
    }
    if (names := spelled.get("pairs")) is not None:
        if not isinstance(names, list) or not names or any(isinstance(name, list | dict | None) for name in names):
            raise DrkdError(
                f"{path}: {place}.pairs: expected a list of names of pairs, or null for all, got {names!r}."
            )
        # As the pairs' own names are.
        spelled["pairs"] = [str(name) for name in names]
    return spelled


def _check(comparison: Comparison, *, source: str) -> None:
    for kind, names in (("pairs", comparison.pairs), ("methods", comparison.methods)):
        for name in names:
            if not _NAME.fullmatch(name) or name.partition(".")[0] == TEACHER:
                raise DrkdError(
                    f"{source}: {kind}.{name}: expected a name of letters, digits and . _ + - other than '{TEACHER}', "
                    "since folders are called so."
                )
    if comparison.reference not in comparison.methods:
        hint = nearest(comparison.reference, list(comparison.methods))
        raise DrkdError(f"{source}: reference: there is no method '{comparison.reference}'{hint}")
    for method, arm in comparison.methods.items():
        for name in arm.pairs or ():
            if name not in comparison.pairs:
                hint = nearest(name, list(comparison.pairs))
                raise DrkdError(f"{source}: methods.{method}.pairs: there is no pair '{name}'{hint}")
    if comparison.methods[comparison.reference].pairs is not None:
        raise DrkdError(
            f"{source}: methods.{comparison.reference}.pairs: the others are compared with this method, so it is for "
            "all pairs; leave the key out."
        )
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds) or min(comparison.seeds) < 0:
        raise DrkdError(f"{source}: seeds: expected different numbers of at least 0, got {comparison.seeds}.")
    if comparison.jobs < 1:
        raise DrkdError(f"{source}: jobs: expected at least 1, got {comparison.jobs}.")
    groups = {"": comparison.overrides}
    groups |= {f"pairs.{name}.": pair.overrides for name, pair in comparison.pairs.items()}
    groups |= {f"methods.{name}.": arm.overrides for name, arm in comparison.methods.items()}
    for place, overrides in groups.items():
        for key in flatten(overrides):
            if key in _DECIDED:
                raise DrkdError(f"{source}: {place}overrides.{key}: the comparison decides this by {_DECIDED[key]}.")
            if key.partition(".")[0] == "method":
                raise DrkdError(f"{source}: {place}overrides.{key}: say this in the init_args of an entry of methods.")
    for name, arm in comparison.methods.items():
        if arm.method is None and arm.arguments:
            raise DrkdError(f"{source}: methods.{name}.init_args: given without a class_path.")
