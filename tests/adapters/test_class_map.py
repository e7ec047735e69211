"""A teacher with classes of its own, joined by name or by a file."""

from __future__ import annotations

import json

import pytest

from drkd.adapters import RetinaNetBuilder, SavedDetectorBuilder, ZooBuilder, save_student
from drkd.adapters.class_map import build_mapped
from drkd.contracts import DrkdError
from drkd.methods import LogitKD
from drkd.recipes.class_map import read_class_map

TEACHER = ("automobile", "dog", "tree")
STUDENT = ("dog", "cat", "car")
BUILDER = RetinaNetBuilder(backbone="resnet18", width=0.125, fpn_channels=16, extra="none")


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "teacher.pt"
    settings = {"min_size": 64, "max_size": 64, "size_divisor": 32}
    save_student(path, BUILDER.build(TEACHER), builder=BUILDER, image_settings=settings)
    return SavedDetectorBuilder(path=str(path))


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_file_joins_classes_and_logit_methods_use_the_shared_ones(saved, tmp_path, suffix):
    file = tmp_path / f"map.{suffix}"
    file.write_text(json.dumps({"automobile": "car"}) if suffix == "json" else "automobile: car\n")
    with pytest.raises(DrkdError, match="class_map in the recipe"):
        saved.build(STUDENT)
    teacher = build_mapped(saved, STUDENT, read_class_map(file))
    assert teacher.spec.class_names == ("car", "dog", "tree")
    method = LogitKD(BUILDER.build(STUDENT).spec, teacher.spec)
    assert method.classes.names == ("dog", "car")
    by_name = build_mapped(saved, STUDENT, read_class_map("names"))
    assert LogitKD(BUILDER.build(STUDENT).spec, by_name.spec).classes.names == ("dog",)


def test_a_published_teacher_is_asked_for_its_own_names():
    zoo = ZooBuilder(name="ssdlite320_mobilenet_v3_large")
    teacher = build_mapped(zoo, ("pup", "blimp"), {"dog": "pup"})
    assert teacher.spec.class_names == ("pup", "blimp")
    assert teacher.label_ids == (18, -1) and teacher.spec.predictions.missing_classes == ("blimp",)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"automobile": "van"}, "van is none of the student's classes"),
        ({"plane": "car"}, "plane is none of the teacher's classes"),
        ({"automobile": "dog"}, "a class called dog already"),
        ({"dog": "car", "automobile": "dog", "tree": "cat"}, None),
    ],
)
def test_maps_that_do_not_fit_are_refused(saved, mapping, message):
    if message is None:
        assert build_mapped(saved, STUDENT, mapping).spec.class_names == ("dog", "car", "cat")
        return
    with pytest.raises(DrkdError, match=message):
        build_mapped(saved, STUDENT, mapping)


def test_nothing_in_common_is_refused(saved):
    with pytest.raises(DrkdError, match="no name in common"):
        build_mapped(saved, ("cat", "cup"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "expected lines like"),
        ("a: 1\n", "in quotes"),
        ("a: car\nb: car\n", "several classes of the teacher's are mapped to car"),
        ("a: [", "cannot be read"),
        ("a: car\na: dog\n", "the key 'a' is there twice"),
    ],
)
def test_files_that_are_no_map_are_refused(tmp_path, text, message):
    file = tmp_path / "map.yaml"
    file.write_text(text)
    with pytest.raises(DrkdError, match=message) as caught:
        read_class_map(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DrkdError, match="cannot be read"):
        read_class_map(tmp_path / "none.yaml")
