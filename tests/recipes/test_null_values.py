"""Null where there is a default and the type has no place for it is refused with the key's name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from drkd.contracts import DrkdError
from drkd.recipes.recipe import load_recipe

_RECIPE: dict[str, Any] = {
    "student": {"class_path": "drkd.adapters.RetinaNetBuilder", "init_args": {"width": 0.25}},
    "method": {"class_path": "drkd.methods.DRKD", "init_args": {"nodes": 4}},
    "data": {"root": "data", "pad_to": None},
    "training": {"steps": 2, "epochs": None, "optimization": {"backbone_learning_rate": None}},
    "evaluation": {"split": None},
    "output": "run",
}


def _load(keys: list[str], folder: Path, value: Any = None) -> None:
    content = copy.deepcopy(_RECIPE)
    place = content
    for key in keys[:-1]:
        place = place.setdefault(key, {})
    place[keys[-1]] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    load_recipe([folder / "recipe.yaml"])


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("data.batch_size", "data.batch_size"),
        ("data.format", "data.format"),
        ("training.accumulate", "training.accumulate"),
        ("training.precision", "training.precision"),
        ("training.optimization.gamma", "training.optimization.gamma"),
        ("training.optimization", "training.optimization"),
        ("evaluation.area_scale", "evaluation.area_scale"),
        ("evaluation", "evaluation"),
        ("overwrite", "overwrite"),
        ("student.init_args.fpn_channels", "student.fpn_channels"),
        ("method.init_args.nodes", "method.nodes"),
    ],
)
def test_null_is_refused_with_its_key(key: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(DrkdError, match=rf"^{named}: expected .*, got null"):
        _load(key.split("."), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.min_size", [32, None]),
        ("data.pad_to", [32, None]),
        ("training.optimization.milestones", [0.5, None]),
        ("student.init_args.stages", [3, None]),
    ],
)
def test_null_in_a_list_is_refused_too(key: str, value: list[float | None], tmp_path: Path) -> None:
    """By jsonargparse itself, which lets it pass only in place of a default."""
    with pytest.raises(DrkdError, match=rf"{key.rpartition('.')[2]}.*None"):
        _load(key.split("."), tmp_path, value)


@pytest.mark.parametrize(
    "key", ["training.ema", "student.init_args.backbone_weights", "teacher", "class_map", "method"]
)
def test_null_that_means_something_passes(key: str, tmp_path: Path) -> None:
    _load(key.split("."), tmp_path)
