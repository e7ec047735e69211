"""Evaluation of a saved detector: classes by name, sizes from the checkpoint, numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.conftest import write_coco, write_detector

from drkd.adapters import RetinaNetBuilder, load_detector
from drkd.contracts import DrkdError
from drkd.data.module import DetectionDataModule
from drkd.recipes.evaluation import evaluate, evaluate_detector
from drkd.recipes.loading import choose_device, find_checkpoint, open_detector


def test_numbers_are_those_of_the_detector_on_that_split(tiny_coco: Path, tiny_detector: Path, tmp_path: Path) -> None:
    output = tmp_path / "numbers.json"
    found = evaluate(tiny_detector, data=str(tiny_coco), cost=True, workers=0, device="cpu", output=output)
    data = DetectionDataModule(str(tiny_coco), min_size=64, max_size=96, batch_size=3, workers=0)
    expected = evaluate_detector(load_detector(tiny_detector), data.val_split, loader=data.val_dataloader())
    assert found.metrics == expected.metrics
    written = json.loads(output.read_text())
    assert written["images"] == 3 and written["split"] == "val" and written["ap"] == found.metrics["ap"]
    assert found.cost is not None and written["cost"]["parameters"] == found.cost["parameters"] > 0
    assert found.cost["image_size"] == [64, 96]


def test_an_output_that_would_replace_an_input_is_refused(tmp_path: Path) -> None:
    data, student = write_coco(tmp_path / "coco"), write_detector(tmp_path / "student.pt")
    annotations = data / "annotations" / "instances_val.json"
    (tmp_path / "link.json").symlink_to(student)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, text in (
        (student, "is read as an input"),
        (tmp_path / "link.json", "is read as an input"),
        (annotations, "is read as an input"),
        (data / "annotations" / ".." / "annotations" / "instances_train.json", "is read as an input"),
        (data / "val" / "1.png", r"ends in \.json: it exists already"),
        (tmp_path / "notes.txt", r"ends in \.json: it exists already"),
        (tmp_path / "numbers", r"ends in \.json\.$"),
    ):
        with pytest.raises(DrkdError, match=text):
            evaluate(student, data=str(data), workers=0, device="cpu", output=output)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, student = write_coco(tmp_path / "coco"), write_detector(tmp_path / "student.pt")
    monkeypatch.setattr("drkd.recipes.evaluation.open_detector", None)
    (tmp_path / "folder.json").mkdir()
    for output, text in (
        (tmp_path / "folder.json", "is a folder"),
        (student / "numbers.json", f"cannot be written: {student}: Not a directory"),
        (student / "deeper" / "numbers.json", f"cannot be written: {student}: Not a directory"),
    ):
        with pytest.raises(DrkdError, match=text):
            evaluate(student, data=str(data), workers=0, device="cpu", output=output)
    monkeypatch.undo()
    new = tmp_path / "new" / "deeper" / "numbers.json"
    evaluate(student, data=str(data), workers=0, device="cpu", output=new)
    assert new.is_file()


def test_a_run_folder_stands_for_its_student(tmp_path: Path) -> None:
    student = write_detector(tmp_path / "student.pt")
    assert find_checkpoint(tmp_path) == student
    (tmp_path / "student.pt").unlink()
    with pytest.raises(DrkdError, match="it is no run folder"):
        find_checkpoint(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DrkdError, match="has not finished"):
        find_checkpoint(tmp_path)


def test_image_sizes_come_from_the_checkpoint_unless_given(tiny_detector: Path) -> None:
    own = open_detector(tiny_detector)
    assert (own.min_size, own.max_size, own.size_divisor) == (64, 96, 32)
    larger = open_detector(tiny_detector, min_size=128)
    assert (larger.min_size, larger.max_size) == (128, 192)
    with pytest.raises(DrkdError, match="min_size <= max_size"):
        open_detector(tiny_detector, min_size=64, max_size=32)


def test_a_student_that_was_trained_with_a_short_side_above_the_limit_opens(
    tiny_detector: Path, tmp_path: Path
) -> None:
    content = torch.load(tiny_detector, weights_only=True)
    content["preprocessing"]["min_size"] = 1600
    torch.save(content, tmp_path / "student.pt")
    own = open_detector(tmp_path / "student.pt")
    assert (own.min_size, own.max_size) == (96, 96)  # which the limit of the long side made of it


def test_classes_are_matched_by_name_whatever_their_order(tiny_coco: Path, tmp_path: Path) -> None:
    swapped = write_coco(tmp_path / "coco", classes=("dog", "cat"))
    detector = write_detector(tmp_path / "student.pt", classes=("bird", "cat", "dog"))
    found = evaluate(detector, data=str(swapped), workers=0, device="cpu")
    assert set(found.metrics["per_class"]) == {"bird", "cat", "dog"}
    assert found.metrics["per_class"]["bird"] is None


def test_classes_that_the_detector_lacks_are_named(tiny_detector: Path, tmp_path: Path) -> None:
    other = write_coco(tmp_path / "coco", classes=("cat", "horse"))
    with pytest.raises(DrkdError, match=r"'horse'.*'cat', 'dog'"):
        evaluate(tiny_detector, data=str(other), workers=0, device="cpu")


def test_a_builder_stands_in_for_a_checkpoint(tiny_coco: Path) -> None:
    torch.manual_seed(0)
    builder = RetinaNetBuilder(width=0.25, fpn_channels=32)
    found = evaluate(data=str(tiny_coco), detector=builder, min_size=64, max_size=96, workers=0, device="cpu", limit=1)
    assert set(found.metrics["per_class"]) == {"cat", "dog"}


def test_checkpoint_and_builder_exclude_each_other(tiny_detector: Path) -> None:
    for checkpoint, builder in ((None, None), (tiny_detector, RetinaNetBuilder())):
        with pytest.raises(DrkdError, match="and not both"):
            open_detector(checkpoint, builder=builder)


@pytest.mark.parametrize("name", ["warp", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DrkdError, match="device"):
        choose_device(name)
