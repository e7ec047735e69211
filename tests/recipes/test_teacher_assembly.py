"""The teachers of a recipe: several at once, other classes, another image size."""

from __future__ import annotations

from pathlib import Path

import pytest

from drkd.adapters import RetinaNetBuilder, save_student
from drkd.contracts import DrkdError
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
