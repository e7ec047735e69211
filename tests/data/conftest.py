"""A tiny COCO folder that tests may spoil."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def _document() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 3, "file_name": "b.png", "height": 40, "width": 60},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 10], "area": 150, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 60, 40], "area": 2400.5, "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 90, "bbox": [1.5, 2.5, 3.0, 4.0]},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 2, "name": "bicycle"}, {"id": 18, "name": "dog"}],
    }


@dataclass
class CocoFolder:
    """A data set on disk whose parts can be changed and written again."""

    root: Path
    document: dict[str, Any] = field(default_factory=_document)

    @property
    def annotations(self) -> Path:
        return self.root / "annotations" / "instances_train.json"

    @property
    def images(self) -> Path:
        return self.root / "train"

    def write(self, *, split: str = "train") -> None:
        self.write_text(json.dumps(self.document), split=split)

    def write_text(self, text: str, *, split: str = "train") -> None:
        path = self.root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")

    def write_image(self, name: str, *, size: tuple[int, int] = (40, 60), split: str = "train") -> Path:
        path = self.root / split / name
        path.parent.mkdir(exist_ok=True, parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    """Two images of 60 x 40 px, three boxes (one of them a crowd), sparse category ids."""
    folder = CocoFolder(tmp_path / "data")
    folder.write_image("a.png")
    folder.write_image("b.png")
    folder.write()
    return folder
