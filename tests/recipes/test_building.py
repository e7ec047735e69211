"""What a library raises on a recipe's numbers is one paragraph that names the part of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drkd.contracts import DrkdError, NotApplicableError
from drkd.recipes.building import explained_by_recipe
from drkd.recipes.recipe import load_recipe
from drkd.recipes.training import build_module


def _recipe(data: Path, detector: Path) -> dict[str, Any]:
    return {
        "student": {
            "class_path": "drkd.adapters.RetinaNetBuilder",
            "init_args": {"width": 0.125, "fpn_channels": 32, "stages": [3, 4]},
        },
        "teacher": {"class_path": "drkd.adapters.SavedDetectorBuilder", "init_args": {"path": str(detector)}},
        "method": {"class_path": "drkd.methods.DRKD", "init_args": {"nodes": 4}},
        "data": {"root": str(data), "batch_size": 2, "min_size": 64, "max_size": 96, "workers": 0},
        "training": {"steps": 2},
        "output": "run",
    }


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("student", "fpn_channels", 2**63),
        ("student", "width", 1e308),
        ("method", "nodes", 2**63),
        ("method", "nodes", []),
    ],
)
def test_an_absurd_number_names_its_part(
    part: str, name: str, value: object, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    content = _recipe(tiny_coco, tiny_detector)
    content[part]["init_args"][name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe([tmp_path / "recipe.yaml"])
    recipe.data.setup("fit")
    with pytest.raises(DrkdError, match=rf"^{part}: this cannot be built") as caught:
        build_module(recipe, kind="distill")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [DrkdError("x"), NotApplicableError("x"), torch.OutOfMemoryError("x")])
def test_what_is_explained_already_stays(error: Exception) -> None:
    with pytest.raises(type(error), match=r"^x$"), explained_by_recipe("student"):
        raise error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("max_size", 2**63),
        ("size_divisor", -1),
        ("workers", -1),
        ("workers", 2**31),
        ("limit", 0),
        ("zoom_out", 1e308),
        ("random_crop", float("nan")),
        ("horizontal_flip", -0.5),
        ("pad_to", [0, 64]),
    ],
)
def test_numbers_of_the_data_are_in_their_range(
    name: str, value: object, tiny_coco: Path, tiny_detector: Path, tmp_path: Path
) -> None:
    content = _recipe(tiny_coco, tiny_detector)
    content["data"][name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DrkdError, match=rf"data\.{name}.*: expected"):
        load_recipe([tmp_path / "recipe.yaml"])
