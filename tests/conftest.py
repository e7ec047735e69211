"""A data set of a few small images in COCO format, and detectors of no skill that fit it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from drkd.adapters import RetinaNetBuilder, save_student

TINY_CLASSES = ("cat", "dog")


def write_coco(root: Path, *, classes: tuple[str, ...] = TINY_CLASSES, train: int = 6, val: int = 3) -> Path:
    """Write a data set of 96 x 64 px images with two or three boxes each."""
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        (root / split).mkdir(parents=True)
        for index in range(1, count + 1):
            picture = Image.new("RGB", (96, 64), (40 * index % 256, 90, 120))
            pen = ImageDraw.Draw(picture)
            images.append({"id": index, "file_name": f"{index}.png", "width": 96, "height": 64})
            for number in range(2 + index % 2):
                x, y, side = 4 + 30 * number, 5 + 3 * index, 16 + 2 * number
                pen.rectangle((x, y, x + side, y + side), fill=(255, 60 * number, 0))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index,
                        "category_id": 3 + 4 * (number % len(classes)),
                        "bbox": [x, y, side, side],
                        "area": side * side,
                        "iscrowd": 0,
                    }
                )
            picture.save(root / split / f"{index}.png")
        categories = [{"id": 3 + 4 * label, "name": name} for label, name in enumerate(classes)]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_detector(path: Path, *, classes: tuple[str, ...] = TINY_CLASSES) -> Path:
    """Save a RetinaNet with random weights as drkd saves students."""
    torch.manual_seed(0)
    builder = RetinaNetBuilder(width=0.25, fpn_channels=32, score_threshold=0.0)
    settings = {"min_size": 64, "max_size": 96, "size_divisor": 32}
    save_student(path, builder.build(classes), builder=builder, image_settings=settings)
    return path


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of nine images and the classes cat and dog. Read only."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def tiny_detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved detector of the classes cat and dog. Read only."""
    return write_detector(tmp_path_factory.mktemp("detector") / "student.pt")
