"""Reads the files of a run folder and writes a report's files, each whole or not at all."""

from __future__ import annotations

import csv
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import yaml
from numpy.typing import NDArray

from drkd.contracts import DrkdError

METRICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)
"""COCO's twelve numbers as ``evaluation.json`` names them."""


@dataclass(frozen=True)
class Curve:
    """One column of ``metrics.csv``.

    Args:
        steps: Optimizer steps, ascending.
        values: The value at each step.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """``evaluation.json``.

    Args:
        metrics: COCO's twelve numbers in [0, 1]; NaN where there was nothing to count.
        per_class: Average precision by class name.
        thresholds_px: Sides of the squares that part small, medium and large objects, px.
        split: Name of the split that was scored; empty where it is not known.
    """

    metrics: Mapping[str, float]
    per_class: Mapping[str, float]
    thresholds_px: tuple[float, float] = (32.0, 96.0)
    split: str = ""

    @property
    def thresholds(self) -> str:
        """What AP_S, AP_M and AP_L mean here, in words."""
        small, medium = (f"{side:g}" for side in self.thresholds_px)
        origin = "as COCO" if self.thresholds_px == (32.0, 96.0) else "scaled to the images; COCO uses 32² and 96²"
        return (
            f"Object sizes by area: small (AP_S) below {small}² px, medium (AP_M) {small}² to {medium}² px, "
            f"large (AP_L) above {medium}² px ({origin})."
        )


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a file that need not be there is empty.

    Args:
        folder: The folder.
        recipe: ``recipe.yaml`` as text.
        facts: ``run.json``: seed, commit, versions, machine, command, started, finished, status.
        curves: Columns of ``metrics.csv`` by name.
        evaluation: ``evaluation.json``.
        cost: ``cost.json``.
        settings: ``recipe.yaml`` as nested plain values.
    """

    folder: Path
    recipe: str
    facts: Mapping[str, Any]
    curves: Mapping[str, Curve]
    evaluation: Evaluation | None
    cost: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_spans(self) -> bool:
        """Whether some terms of its method have a part of the run only (``span``, ``response_span``)."""
        return _names_span(self.settings.get("method"))


def read_run(folder: Path) -> Run:
    """Read a run folder. ``run.json`` must be there, the rest may be missing, nothing may be damaged.

    Raises:
        DrkdError: Naming file and field.
    """
    if not folder.is_dir():
        raise DrkdError(f"The run folder {folder} does not exist.")
    facts = read_json(folder / "run.json", kind=dict)
    recipe = folder / "recipe.yaml"
    curves = folder / "metrics.csv"
    evaluation = folder / "evaluation.json"
    cost = folder / "cost.json"
    text = _read_text(recipe) if recipe.exists() else ""
    settings = _parse_recipe(text, path=recipe)
    scores = read_evaluation(evaluation) if evaluation.exists() else None
    if scores is not None and not scores.split:
        # Runs of before the file said so.
        told = settings.get("evaluation")
        scores = replace(scores, split=str((told.get("split") if isinstance(told, Mapping) else None) or ""))
    return Run(
        folder=folder,
        recipe=text,
        facts=facts,
        curves=read_curves(curves) if curves.exists() else {},
        evaluation=scores,
        cost=read_cost(cost) if cost.exists() else {},
        settings=settings,
    )


def read_json(path: Path, *, kind: type[dict[Any, Any]] | type[list[Any]]) -> Any:
    """Read a JSON file whose outermost value is an object (dict) or an array (list)."""
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DrkdError(f"{path} is no valid JSON: {error.msg} in line {error.lineno}. Was its run cut off?") from error
    if not isinstance(content, kind):
        expected = "an object" if kind is dict else "an array"
        raise DrkdError(f"{path} should hold {expected}, got {type(content).__name__}.")
    return content


def read_evaluation(path: Path) -> Evaluation:
    """Read ``evaluation.json``: the twelve numbers, ``per_class``, ``thresholds_px`` and ``split``."""
    return parse_evaluation(read_json(path, kind=dict), source=str(path))


def parse_evaluation(content: Mapping[str, Any], *, source: str) -> Evaluation:
    """Check the content of an ``evaluation.json``.

    Args:
        content: The object.
        source: Where it came from, for messages.
    """
    metrics = {name: _read_score(content, name, source=source) for name in METRICS}
    classes = content.get("per_class", {})
    if not isinstance(classes, Mapping):
        raise DrkdError(f"{source}: field per_class should be an object, got {type(classes).__name__}.")
    per_class = {str(name): _read_score(classes, name, source=f"{source}, per_class") for name in classes}
    sides = content.get("thresholds_px", [32.0, 96.0])
    if not (isinstance(sides, list) and len(sides) == 2 and all(_is_number(side) and side > 0 for side in sides)):
        raise DrkdError(f"{source}: field thresholds_px should be two lengths in px, got {sides!r}.")
    split = content.get("split") or ""
    if not isinstance(split, str):
        raise DrkdError(f"{source}: field split should be the name of a split, got {split!r}.")
    return Evaluation(metrics, per_class, (float(sides[0]), float(sides[1])), split)


def read_cost(path: Path) -> dict[str, Any]:
    """Read ``cost.json``: at least ``parameters``, ``flops`` and ``latency_ms``."""
    content: dict[str, Any] = read_json(path, kind=dict)
    for name in ("parameters", "flops", "latency_ms"):
        value = content.get(name)
        if not _is_number(value) or float(value or 0) < 0:
            raise DrkdError(f"{path}: field {name} should be a number >= 0, got {value!r}.")
    return content


def read_curves(path: Path) -> dict[str, Curve]:
    """Read ``metrics.csv``: a ``step`` column and one column a quantity, empty where it was not logged."""
    found: dict[str, dict[int, float]] = {}
    reader = csv.DictReader(_read_text(path).splitlines())
    if "step" not in (reader.fieldnames or []):
        raise DrkdError(f"{path} should have a column named step, got columns {list(reader.fieldnames or [])}.")
    for line, row in enumerate(reader, start=2):
        step = _parse_number(row["step"] or "", path=path, line=line, column="step")
        for column, text in row.items():
            # DictReader files surplus cells under None; csv holds "" where nothing was logged at this step.
            if column is None or column == "step" or not text:
                continue
            found.setdefault(column, {})[int(step)] = _parse_number(text, path=path, line=line, column=column)
    return {
        column: Curve(tuple(sorted(points)), tuple(points[step] for step in sorted(points)))
        for column, points in found.items()
    }


def read_arrays(path: Path, shapes: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """Read an ``.npz`` file and check the arrays' shapes.

    Args:
        path: The file. No pickled objects are loaded.
        shapes: By array name, its shape as words: letters are sizes that must agree between the arrays, digits are
            fixed ("n h w 3").
    """
    if not path.exists():
        raise DrkdError(f"{path} is missing.")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DrkdError(f"{path} is no readable NumPy archive: {error}") from error
    sizes: dict[str, int] = {}
    for name, words in shapes.items():
        if name not in arrays:
            raise DrkdError(f"{path}: array {name} is missing, it should be ({words.replace(' ', ', ')}).")
        shape = arrays[name].shape
        expected = words.split()
        fits = len(shape) == len(expected) and all(
            size == (int(word) if word.isdigit() else sizes.setdefault(word, size))
            for word, size in zip(expected, shape, strict=True)
        )
        if not fits:
            known = ", ".join(str(sizes.get(word, word)) for word in expected)
            raise DrkdError(f"{path}: array {name} should be ({known}), got {shape}.")
    return arrays


def write_atomically(path: Path, content: bytes) -> Path:
    """Write aside and rename, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only their owner may read; a report is for everyone.
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    return path


def _names_span(content: object) -> bool:
    if not isinstance(content, Mapping):
        return False
    return any(
        _names_span(value) or (str(key).endswith("span") and value not in (None, [0, 1]))
        for key, value in content.items()
    )


def _parse_recipe(text: str, *, path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise DrkdError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise DrkdError(f"{path} should hold a recipe's settings, got {type(content).__name__}.")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DrkdError(f"{path} is missing.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DrkdError(f"{path} cannot be read: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_score(content: Mapping[str, Any], name: str, *, source: str) -> float:
    """Return a score in [0, 1]; NaN for null, NaN and COCO's -1, which all say that there was nothing to count."""
    if name not in content:
        raise DrkdError(f"{source}: field {name} is missing.")
    value = content[name]
    if value is None or value == -1 or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    if not _is_number(value) or not 0 <= value <= 1:
        raise DrkdError(f"{source}: field {name} should be a score in [0, 1] or null, got {value!r}.")
    return float(value)


def _parse_number(text: str, *, path: Path, line: int, column: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DrkdError(f"{path}, line {line}: column {column} should hold a number, got {text!r}.") from error
