"""The teachers of a recipe: several at once, other classes, another image size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contract.adapter_examples import make_builder

from drkd.adapters import RetinaNetBuilder, save_student
from drkd.adapters.pyramid_detector import PyramidDetector
from drkd.contracts import DetectionBatch, Detections, DrkdError
from drkd.recipes.doctor.preprocessing import average_precision
from drkd.recipes.recipe import Recipe, load_recipe
from drkd.recipes.training import build_module, distill

SAVED = "{class_path: drkd.adapters.SavedDetectorBuilder, init_args: {path: %s}}"


def write_detector(path: Path, *, classes: tuple[str, ...]) -> Path:
    builder = RetinaNetBuilder(width=0.25, fpn_channels=32)
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(path, builder.build(classes), builder=builder, image_settings=settings)
    return path


def _recipe(tiny_coco: Path, folder: Path, text: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(
        f"""
student: {{class_path: drkd.adapters.SSDLiteBuilder, init_args: {{width: 0.25, size: 96}}}}
method: {{class_path: drkd.methods.PKD, init_args: {{missing_levels: nearest}}}}
data: {{root: {tiny_coco}, batch_size: 2, min_size: 64, max_size: 96, workers: 0}}
training: {{steps: 1, validate_every: 0, accelerator: cpu}}
evaluation: {{split: null}}
output: {folder / "run"}
{text}
"""
    )
    return load_recipe([file])


def test_several_teachers_of_several_classes_and_sizes(tiny_coco: Path, tmp_path: Path) -> None:
    one = write_detector(tmp_path / "one.pt", classes=("cat", "dog"))
    other = write_detector(tmp_path / "other.pt", classes=("feline", "dog", "tree"))
    names = tmp_path / "map.yaml"
    names.write_text("feline: cat\n")
    text = f"""
teachers:
  one: {{detector: {SAVED % one}}}
  other: {{detector: {SAVED % other}, weight: 0.5, class_map: {names}, teacher_size: 128}}
"""
    result = distill(_recipe(tiny_coco, tmp_path, text))
    distiller = result.distiller
    assert set(distiller.monitor.terms) == {"one.pkd", "other.pkd"}
    assert distiller.method is not None
    assert distiller.method.weights == {"one.pkd": 1.0, "other.pkd": 0.5}
    other_spec = distiller.teacher.members["other"].spec
    assert other_spec.class_names == ("cat", "dog", "tree")
    # Twice the images, half the strides.
    assert [level.stride for level in other_spec.levels] == [4, 8, 16, 32, 64]
    # The student resizes 64 px to its 96.
    assert distiller.student.spec.levels[0].stride == pytest.approx(16 * 64 / 96)
    assert (result.folder / "student.pt").is_file()
    report = json.loads((result.folder / "doctor.json").read_text())
    assert set(report["numbers"]["teachers"]) == {"one", "other"}
    said = [finding["text"] for finding in report["findings"] if finding["check"] == "teacher"]
    assert len(said) == 2 and said[0].startswith("one: The teacher's AP is") and said[1].startswith("other: ")


def test_a_teacher_without_heads(tiny_coco: Path, tmp_path: Path) -> None:
    path = make_builder("drkd.adapters.mmdetection.MMDetectionBuilder#features", tmp_path).path
    builder = f"{{class_path: drkd.adapters.MMDetectionBuilder, init_args: {{path: {path}, part: features}}}}"
    result = distill(_recipe(tiny_coco, tmp_path, f"teacher: {builder}\n"))
    report = json.loads((result.folder / "doctor.json").read_text())
    (said,) = [finding for finding in report["findings"] if finding["check"] == "teacher"]
    assert said["severity"] == "ok" and "AP was not measured" in said["text"] and "no heads" in said["text"]
    assert report["numbers"]["teacher"] is None and len(report["numbers"]["features"]["teacher"]) == 5


def test_a_teachers_classes_are_found_by_name(tiny_coco: Path, tmp_path: Path) -> None:
    """Its labels 0 and 1 are the data's classes 1 and none."""

    class Told(PyramidDetector):
        def detect(self, batch: DetectionBatch) -> list[Detections]:
            return [
                Detections(target.boxes, torch.ones(len(target.boxes)), 1 - target.labels) for target in batch.targets
            ]

    recipe = _recipe(tiny_coco, tmp_path, "")
    recipe.data.setup("fit")
    split = recipe.data.val_split
    batch = next(iter(recipe.data.val_dataloader()))
    batch = replace(batch, original_sizes=batch.sizes)
    for record in split.records:
        assert set(record.labels.tolist()) == {0, 1}
    net = RetinaNetBuilder(width=0.25, fpn_channels=32).build(["x"]).model.backbone
    found = {}
    for names in (("dog", "cat"), ("dog", "tree"), ("cat", "dog")):
        told = Told(net, names, mean=[0.0] * 3, std=[1.0] * 3)
        found[names] = average_precision(told, [batch], split)[""]["ap"]
    assert found["dog", "cat"] > found["dog", "tree"] > found["cat", "dog"] == 0


def test_one_teacher_with_a_map_and_a_size(tiny_coco: Path, tmp_path: Path) -> None:
    other = write_detector(tmp_path / "other.pt", classes=("cat", "tree"))
    recipe = _recipe(tiny_coco, tmp_path, f"teacher: {SAVED % other}\nclass_map: names\nteacher_size: 32\n")
    recipe.data.setup("fit")
    teacher = build_module(recipe, kind="distill").distiller.teacher
    assert teacher is not None and teacher.spec.class_names == ("cat", "tree")
    assert teacher.spec.levels[0].stride == 16
    refused = _recipe(tiny_coco, tmp_path, f"teacher: {SAVED % other}\n")
    with pytest.raises(DrkdError, match="class_map in the recipe"):
        build_module(refused, kind="distill")
    text = f"teacher: {SAVED % other}\nteachers:\n  one: {{detector: {SAVED % other}}}\n"
    with pytest.raises(DrkdError, match="leave out teacher"):
        build_module(_recipe(tiny_coco, tmp_path, text), kind="distill")
