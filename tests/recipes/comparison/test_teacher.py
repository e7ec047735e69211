"""A pair's teacher is scored as it teaches: with its class map and at its size of image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import RECIPE

from drkd.contracts import DetectionBatch, Detections
from drkd.recipes.comparison.cell import make_cells
from drkd.recipes.comparison.definition import load_comparison
from drkd.recipes.comparison.teacher import evaluate_teacher
from drkd.recipes.recipe import load_recipe


class Knowing:
    """Stands in for a teacher's ``detect``: it knows every image's boxes, and numbers dog, bird, cat."""

    def __init__(self) -> None:
        self.widths: set[int] = set()

    def __call__(self, batch: DetectionBatch) -> list[Detections]:
        self.widths.add(batch.image_size[1])
        found = []
        for target, size, original in zip(batch.targets, batch.sizes, batch.original_sizes, strict=True):
            scale = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
            labels = torch.tensor([2, 0])[target.labels]
            # And a bird on each, which the data does not know.
            boxes, labels = (target.boxes * scale).repeat(2, 1), torch.cat([labels, torch.ones_like(labels)])
            found.append(Detections(boxes, torch.ones(len(boxes)), labels))
        return found


def test_the_class_map_and_the_size_count(tmp_path: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "map.yaml").write_text("hound: dog\nfeline: cat\n")
    builder = {
        "class_path": "drkd.adapters.RetinaNetBuilder",
        "init_args": {"width": 0.25, "fpn_channels": 32, "norm": "frozen"},
    }
    content = {**RECIPE, "teacher": builder, "data": {**RECIPE["data"], "root": str(tiny_coco)}}
    content |= {"class_map": str(tmp_path / "map.yaml"), "teacher_size": 128, "evaluation": {"split": "val"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    knowing = Knowing()
    monkeypatch.setattr(
        "drkd.adapters.RetinaNetBuilder.own_class_names", lambda _: ("hound", "bird", "feline"), raising=False
    )
    monkeypatch.setattr(
        "drkd.adapters.torchvision_detector.TorchvisionDetector.detect", lambda _, batch: knowing(batch)
    )
    folder = evaluate_teacher(load_recipe([str(tmp_path / "recipe.yaml")], [f"--output={tmp_path / 'run'}"]))
    scores = json.loads((folder / "evaluation.json").read_text())
    assert scores["ap"] == pytest.approx(1.0) and scores["split"] == "val"
    # Shorter sides of 64 px are shown to it as 128.
    assert min(knowing.widths) >= 128


def test_another_class_map_is_another_teacher(comparison_file: Path) -> None:
    (cell, *_) = make_cells(load_comparison(comparison_file, ["--overrides.class_map=names"]), source="x")
    assert cell.method == "teacher" and cell.settings["class_map"] == "names"


def test_a_teacher_that_finds_no_objects_has_no_cell(comparison_file: Path) -> None:
    recipe = comparison_file.with_name("recipe.yaml")
    content = yaml.safe_load(recipe.read_text())
    for detections, names in ((None, ["student"]), ("my_module:detections", ["teacher", "student"])):
        arguments = {"factory": "my_module:build", "layers": ["neck"], "detections": detections}
        content["teacher"] = {"class_path": "drkd.adapters.HookedBuilder", "init_args": arguments}
        recipe.write_text(yaml.safe_dump(content))
        comparison = load_comparison(comparison_file, ["--seeds=[0]"])
        assert [cell.method for cell in make_cells(comparison, source="x")][: len(names)] == names
