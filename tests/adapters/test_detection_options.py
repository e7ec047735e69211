"""Thresholds and numbers of detections are refused by name, from a builder, a wrapper or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drkd.adapters import (
    DetrBuilder,
    FasterRCNNBuilder,
    MMDetectionBuilder,
    PretrainedDetrBuilder,
    RetinaNetBuilder,
    SSD300Builder,
    UltralyticsBuilder,
    ZooBuilder,
    load_detector,
    save_student,
)
from drkd.adapters.detection_options import check_detection_options
from drkd.contracts import DrkdError

SETTINGS = {"min_size": 64, "max_size": 64, "size_divisor": 32}
WRONG: list[tuple[str, Any, str]] = [
    ("score_threshold", -0.1, r"score_threshold: expected a number in \[0, 1\], got -0\.1"),
    ("score_threshold", float("nan"), r"score_threshold: expected a number in \[0, 1\], got nan"),
    ("score_threshold", "0.5", r"score_threshold: expected a number in \[0, 1\], got '0\.5'"),
    ("detections_per_image", 0, "detections_per_image: expected a whole number of at least 1, got 0"),
    ("detections_per_image", 1.5, r"detections_per_image: expected a whole number of at least 1, got 1\.5"),
]
YOLO_ONLY: list[tuple[str, Any, str]] = [
    ("nms_threshold", 2**63, r"nms_threshold: expected a number in \[0, 1\], got 9223372036854775808"),
    ("several_labels", "x", "several_labels: expected true or false, got 'x'"),
]


@pytest.mark.parametrize(("name", "value", "message"), [*WRONG, *YOLO_ONLY])
def test_what_is_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(DrkdError, match=f"^{message}"):
        check_detection_options({name: value})
    with pytest.raises(DrkdError, match=f"^{message}"):
        UltralyticsBuilder(**{name: value})


def test_what_is_allowed() -> None:
    check_detection_options({})
    check_detection_options({"score_threshold": 0, "nms_threshold": 1.0, "detections_per_image": 1, "other": "x"})


@pytest.mark.parametrize("builder", [RetinaNetBuilder, FasterRCNNBuilder, SSD300Builder])
@pytest.mark.parametrize(("name", "value", "message"), [*WRONG, *YOLO_ONLY[:1]])
def test_builders_of_torchvision(builder: Any, name: str, value: Any, message: str) -> None:
    with pytest.raises(DrkdError, match=message):
        builder(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("score_threshold", -0.1), ("detections_per_image", 0), ("nms_threshold", 2**63)]
)
def test_a_file_of_torchvision(name: str, value: Any, tmp_path: Path) -> None:
    builder = RetinaNetBuilder(backbone="resnet18", width=0.125, fpn_channels=32, extra="none")
    file = tmp_path / "student.pt"
    save_student(file, builder.build(["cat"]), builder=builder, image_settings=SETTINGS)
    content = torch.load(file, weights_only=True)
    content["builder"]["init_args"][name] = value
    torch.save(content, file)
    with pytest.raises(DrkdError, match=f"student.pt: {name}: expected"):
        load_detector(file)


def test_builders_of_trained_detectors() -> None:
    with pytest.raises(DrkdError, match="detections_per_image: expected"):
        MMDetectionBuilder(path="x.pth", detections_per_image=0)
    with pytest.raises(DrkdError, match="detections_per_image: expected"):
        ZooBuilder(name="retinanet_resnet50_fpn", detections_per_image=0)


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_builders_of_transformers(name: str, value: Any, message: str) -> None:
    for build in (DetrBuilder, lambda **options: PretrainedDetrBuilder(name="some/where", **options)):
        with pytest.raises(DrkdError, match=message):
            build(**{name: value})


@pytest.mark.parametrize(("name", "value", "message"), [*WRONG, *YOLO_ONLY])
def test_a_yolo_from_a_file_and_a_wrapped_one(name: str, value: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("ultralytics")
    from tests.adapters.yolos import build_yolo

    with pytest.raises(DrkdError, match=message):
        build_yolo(**{name: value})
    file = tmp_path / "student.pt"
    save_student(file, build_yolo(), builder=UltralyticsBuilder(), image_settings=SETTINGS)
    content = torch.load(file, weights_only=True)
    content["build"]["options"][name] = value
    torch.save(content, file)
    with pytest.raises(DrkdError, match=f"student.pt: {message}"):
        load_detector(file)
