"""Saving and loading detectors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drkd.adapters import (
    FasterRCNNBuilder,
    RetinaNetBuilder,
    SavedDetectorBuilder,
    SSDLiteBuilder,
    ZooBuilder,
    load_detector,
    load_state,
    save_student,
    wrap_torchvision,
)
from drkd.adapters.checkpoint import read_category_ids, read_preprocessing
from drkd.adapters.weights import shipped_checkpoint
from drkd.contracts import DrkdError

CLASSES = ("cat", "dog", "cup")
SETTINGS = {"min_size": 64, "max_size": 64, "size_divisor": 32}
SMALL = RetinaNetBuilder(backbone="resnet18", width=0.25, fpn_channels=16, extra="none", score_threshold=0.0)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "student.pt"
    save_student(path, SMALL.build(CLASSES), builder=SMALL, image_settings=SETTINGS)
    return path


def test_a_saved_detector_comes_back(builder, make_batch, tmp_path):
    detector = builder.build(CLASSES).eval()
    path = tmp_path / "folder" / "student.pt"
    save_student(path, detector, builder=builder, image_settings=SETTINGS, extra={"seed": 1})
    loaded = load_detector(path)
    assert loaded.spec == detector.spec and not loaded.training
    assert list(loaded.model.state_dict()) == list(detector.model.state_dict())
    batch = make_batch([(64, 64), (40, 50)])
    for ours, theirs in zip(detector.detect(batch), loaded.detect(batch), strict=True):
        assert len(ours.boxes) > 0
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.labels, theirs.labels)
    assert [file.name for file in path.parent.iterdir()] == ["student.pt"]


def test_the_file_holds_plain_values_only(saved):
    content = torch.load(saved, weights_only=True)
    assert content["format"] == "drkd-student-1"
    assert content["class_names"] == list(CLASSES)
    assert content["builder"]["class_path"] == "drkd.adapters.torchvision.RetinaNetBuilder"
    assert content["preprocessing"]["color"] == "RGB" and content["preprocessing"]["min_size"] == 64
    assert read_preprocessing(saved) == content["preprocessing"]
    assert type(content["state_dict"]) is dict
    assert not any(name.startswith("model.") for name in content["state_dict"])


def test_of_several_short_sides_the_largest_is_saved(tmp_path):
    path = tmp_path / "student.pt"
    save_student(path, SMALL.build(CLASSES), builder=SMALL, image_settings={**SETTINGS, "min_size": [48, 64, 56]})
    assert read_preprocessing(path)["min_size"] == 64
    save_student(path, SMALL.build(CLASSES), builder=SMALL, image_settings={**SETTINGS, "min_size": 800})
    assert read_preprocessing(path)["min_size"] == 64  # the limit of the long side, as in the images
    with pytest.raises(ValueError, match=r"\['max_size'\] are missing"):
        save_student(path, SMALL.build(CLASSES), builder=SMALL, image_settings={"min_size": 1, "size_divisor": 1})


def test_half_precision_halves_the_file(make_batch, saved, tmp_path):
    detector = load_detector(saved)
    variance = detector.model.backbone.body["bn1"].running_var
    variance[0] = 1e6
    path = tmp_path / "half.pt"
    save_student(path, detector, builder=SavedDetectorBuilder(str(saved)), image_settings=SETTINGS, half=True)
    assert path.stat().st_size < 0.65 * saved.stat().st_size
    loaded = load_detector(path)
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    # Too large for 16 bits: stored whole.
    assert torch.equal(loaded.model.backbone.body["bn1"].running_var, variance)
    batch = make_batch([(64, 64)])
    a, b = (d(batch, want=frozenset({"features"})).features[0].tensor for d in (detector, loaded))
    torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_as_a_teacher(saved):
    names = ("cup", "cat", "dog")
    teacher = SavedDetectorBuilder(str(saved)).build(names)
    assert teacher.spec.class_names == names and teacher.label_ids == (2, 0, 1)
    with pytest.raises(DrkdError, match=r"knows 3 classes \(cat, dog, cup\), but 2 are wanted \(cat, bird\)") as caught:
        SavedDetectorBuilder(str(saved)).build(("cat", "bird"))
    assert str(saved) in str(caught.value)


def test_a_teacher_that_knows_nothing(saved):
    torch.manual_seed(5)
    control, again = (SavedDetectorBuilder(str(saved), random_weights=True).build(CLASSES) for _ in range(2))
    own, random, repeated = (d.model.state_dict() for d in (load_detector(saved), control, again))
    assert control.spec == load_detector(saved).spec
    assert all(torch.equal(random[name], repeated[name]) for name in random), "a resumed run must meet the same one"
    convolution = "backbone.body.layer1.0.conv1.weight"
    assert not torch.allclose(own[convolution], random[convolution])
    assert torch.initial_seed() == 5, "the run's own random numbers are left alone"


def test_random_weights_are_torchvisions_alone(saved):
    content = torch.load(saved, weights_only=True)
    content["build"]["library"] = "transformers"
    torch.save(content, saved)
    with pytest.raises(DrkdError, match=r"student.pt: random_weights .* is of transformers"):
        SavedDetectorBuilder(str(saved), random_weights=True).build(CLASSES)


def test_labels_survive_another_order_of_classes(make_batch, saved, tmp_path):
    builder = SavedDetectorBuilder(str(saved))
    turned = builder.build(("cup", "cat", "dog"))
    path = tmp_path / "again.pt"
    save_student(path, turned, builder=builder, image_settings=SETTINGS)
    assert torch.load(path, weights_only=True)["class_names"] == list(CLASSES)
    again = load_detector(path, class_names=("cup", "cat", "dog"))
    batch = make_batch([(64, 64)])
    first, second, third = (d.detect(batch)[0].labels for d in (load_detector(saved), turned, again))
    assert torch.equal(second, third) and torch.equal(second, (first + 1) % 3)


@pytest.mark.parametrize(
    "make",
    [
        SMALL,
        FasterRCNNBuilder(backbone="resnet18", width=0.25, fpn_channels=16, representation_size=16),
        SSDLiteBuilder(width=0.25, size=96),
    ],
    ids=["retinanet", "faster_rcnn", "ssdlite"],
)
def test_weights_of_a_file_keep_what_their_outputs_mean(make, make_batch, tmp_path):
    path = tmp_path / "student.pt"
    detector = make.build(CLASSES).eval()
    save_student(path, detector, builder=make, image_settings=SETTINGS)
    turned = replace(make, weights=str(path)).build(CLASSES[::-1]).eval()
    assert turned.label_ids == detector.label_ids[::-1]
    batch = make_batch([(64, 64)])
    (ours,), (theirs,) = detector.detect(batch), turned.detect(batch)
    assert torch.equal(2 - ours.labels, theirs.labels) and torch.equal(ours.scores, theirs.scores)
    with pytest.raises(DrkdError, match=r"was trained on cat, dog, cup, and not on cow, hen: its outputs"):
        replace(make, weights=str(path)).build_teacher(("cow", "hen", "cup"))
    # A bare state dict says nothing of its classes.
    torch.save(detector.model.state_dict(), path)
    assert replace(make, weights=str(path)).build(("cow", "hen", "cup")).label_ids == detector.label_ids


def test_a_zoo_file_of_as_many_other_classes_gets_a_new_head(tmp_path):
    path, zoo = tmp_path / "student.pt", ZooBuilder(name="ssdlite320_mobilenet_v3_large", head="new")
    detector = zoo.build(CLASSES)
    save_student(path, detector, builder=zoo, image_settings=SETTINGS)
    given = replace(zoo, weights=str(path))
    assert given.build_teacher(("dog", "cat", "cup")).label_ids == (2, 1, 3)
    with pytest.raises(DrkdError, match=r"outputs for other classes \(cat, dog, cup\)"):
        given.build_teacher(("a", "b", "c"))
    with pytest.warns(UserWarning, match="the class layer of this ssdlite"):
        other = given.build(("a", "b", "c")).model.state_dict()
    own = detector.model.state_dict()
    same = {name for name, value in other.items() if torch.equal(value, own[name])}
    classes = {name for name in own if name.startswith("head.classification_head.")}
    assert classes - same and {name for name in own if name not in classes} <= same


def test_zoo_students_come_back(make_batch, tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.save(ZooBuilder(name=name, head="new").build(CLASSES).model.state_dict(), tmp_path / "weights.pth")
    builder = ZooBuilder(name=name, head="new", weights=str(tmp_path / "weights.pth"))
    detector = builder.build(CLASSES).eval()
    detector.model.roi_heads.score_thresh = 0.0
    save_student(tmp_path / "zoo.pt", detector, builder=builder, image_settings=SETTINGS)
    loaded = load_detector(tmp_path / "zoo.pt")
    loaded.model.roi_heads.score_thresh = 0.0
    batch = make_batch([(64, 64)])
    assert torch.equal(detector.detect(batch)[0].scores, loaded.detect(batch)[0].scores)


def test_a_model_of_your_own_is_saved_without_a_builder(tmp_path):
    model = SMALL.build(CLASSES).model
    path = tmp_path / "own.pt"
    save_student(path, wrap_torchvision(model, CLASSES), builder=None, image_settings=SETTINGS)
    with pytest.raises(DrkdError, match="cannot rebuild"):
        load_detector(path)
    other = SMALL.build(CLASSES).model
    load_state(other, path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_mismatch_names_keys_and_shapes(saved, tmp_path):
    with pytest.raises(DrkdError, match=r"missing: .*unexpected: ") as caught:
        load_state(replace(SMALL, backbone="timm/resnet10t", width=1.0).build(CLASSES).model, saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DrkdError, match=r"of another shape: .*expected \(18, 16, 3, 3\), got \(27, 16, 3, 3\)"):
        load_state(SMALL.build(CLASSES[:2]).model, saved)


def test_pickled_objects_are_refused_unexecuted(tmp_path):
    target = tmp_path / "made_by_the_checkpoint"
    path = tmp_path / "evil.pt"
    torch.save({"format": "drkd-student-1", "state_dict": Payload(target)}, path)
    for load in (load_detector, lambda file: load_state(torch.nn.Linear(1, 1), file)):
        with pytest.raises(DrkdError, match="could run code"):
            load(path)
    assert not target.exists()


def test_a_builder_of_the_files_choice_is_refused(saved):
    content = torch.load(saved, weights_only=True)
    content["builder"]["class_path"] = "os.system"
    torch.save(content, saved)
    with pytest.raises(DrkdError, match=r"asks for builder 'os.system'"):
        load_detector(saved)
    content["builder"] = {"class_path": "drkd.adapters.torchvision.RetinaNetBuilder", "init_args": {"colour": 1}}
    torch.save(content, saved)
    with pytest.raises(DrkdError, match="does not fit this version"):
        load_detector(saved)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(DrkdError, match=r"broken.pt: not") as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)


def test_a_file_cut_short(saved):
    saved.write_bytes(saved.read_bytes()[: saved.stat().st_size // 2])
    with pytest.raises(DrkdError, match=r"student.pt: not"):
        load_detector(saved)


def test_what_holds_no_state(tmp_path):
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    with pytest.raises(DrkdError, match="expected a state dict"):
        load_state(torch.nn.Linear(1, 1), path)
    with pytest.raises(DrkdError, match="not a detector saved by drkd"):
        load_detector(path)
    with pytest.raises(DrkdError, match="no such checkpoint"):
        load_detector(tmp_path / "absent.pt")


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(_, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space"):
        save_student(saved, SMALL.build(CLASSES), builder=SMALL, image_settings=SETTINGS)
    assert saved.read_bytes() == before and [file.name for file in saved.parent.iterdir()] == ["student.pt"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("class_names", ["cat", 3, "cup"], "class_names: expected a list of names"),
        ("label_ids", [0, "x", 2], "label_ids: expected a number"),
        ("label_ids", [0], "label_ids: expected a number for each of 3"),
        ("preprocessing", [], "preprocessing: expected keys"),
        ("preprocessing", {**SETTINGS, "min_size": float("inf")}, "preprocessing.min_size: expected px"),
        ("preprocessing", {**SETTINGS, "max_size": 2**31}, "preprocessing.max_size: expected px"),
        ("preprocessing", {**SETTINGS, "size_divisor": 0}, "preprocessing.size_divisor: expected px"),
        ("build", "x", "build: expected keys"),
        ("builder", 3, "builder: expected keys"),
    ],
)
def test_values_of_the_wrong_kind_are_named(saved, field, value, expected):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, field: value}, saved)
    for read in (load_detector, read_preprocessing, read_category_ids):
        with pytest.raises(DrkdError, match=rf"student\.pt: {expected}"):
            read(saved)


@pytest.mark.parametrize("extra", [[], {"category_ids": ["cat"]}, {"category_ids": {"cat": float("inf")}}])
def test_category_ids_are_numbers(saved, extra):
    torch.save({**torch.load(saved, weights_only=True), "extra": extra}, saved)
    with pytest.raises(DrkdError, match=r"student\.pt: extra\.category_ids: expected a number"):
        read_category_ids(saved)


def test_arguments_of_the_builder_are_of_its_types(saved):
    content = torch.load(saved, weights_only=True)
    content["builder"]["init_args"]["detections_per_image"] = "x"
    torch.save(content, saved)
    with pytest.raises(DrkdError, match=r"builder\.init_args\.detections_per_image: expected int, got 'x'"):
        load_detector(saved)


def test_a_file_sends_nobody_to_other_files_or_the_network(saved):
    content = torch.load(saved, weights_only=True)
    content["builder"]["init_args"].update(weights="../elsewhere.pt", backbone_weights="imagenet")
    torch.save(content, saved)
    assert load_detector(saved).spec.class_names == CLASSES


def test_a_name_too_long_for_a_file_is_one_paragraph():
    with pytest.raises(DrkdError, match="cannot be read"):
        load_detector("a" * 3000)


def test_a_run_folder_stands_for_its_student(tmp_path):
    (tmp_path / "student.pt").write_bytes(b"")
    assert shipped_checkpoint(tmp_path) == tmp_path / "student.pt"
    assert shipped_checkpoint(tmp_path / "student.pt") == tmp_path / "student.pt"
    assert shipped_checkpoint("x" * 5000) == Path("x" * 5000)
