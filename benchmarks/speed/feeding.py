"""Whether data loading and evaluation keep up with training."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from drkd.contracts import Detections, ImageRecord
from drkd.data.module import DetectionDataModule
from drkd.evaluation import CocoEvaluator

_SIDES = (480, 640)


def loader_rate(*, size: tuple[int, int], images: int, workers: int, batch_size: int = 2) -> dict[str, Any]:
    """Images a second of the training loader on JPEG files of COCO's usual size, resized as in training.

    Args:
        size: Short side and limit of the long side, px.
        images: How many files are made and read once, after a first epoch that starts the workers.
        workers: Processes.
        batch_size: Images a batch.
    """
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "train").mkdir()
        (root / "annotations").mkdir()
        entries, boxes = [], []
        for index in range(1, images + 1):
            small = generator.integers(0, 255, (_SIDES[0] // 8, _SIDES[1] // 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize(_SIDES[::-1]).save(root / "train" / f"{index}.jpg", quality=92)
            entries.append({"id": index, "file_name": f"{index}.jpg", "height": _SIDES[0], "width": _SIDES[1]})
            boxes += [
                {
                    "id": 7 * index + n,
                    "image_id": index,
                    "category_id": 1,
                    "bbox": [9 * n, 9 * n, 90, 60],
                    "area": 5400,
                    "iscrowd": 0,
                }
                for n in range(7)
            ]
        content = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
        data = DetectionDataModule(
            folder, min_size=size[0], max_size=size[1], batch_size=batch_size, workers=workers, val_split="train"
        )
        loader = data.train_dataloader()
        for _ in loader:
            pass
        started = time.perf_counter()
        count = sum(len(batch) for batch in loader)
        seconds = time.perf_counter() - started
    return {"images": count, "workers": workers, "size": list(size), "images_per_second": count / seconds}


def evaluation_seconds(
    *, images: int = 5000, detections: int = 100, boxes: int = 7, classes: int = 80
) -> dict[str, Any]:
    """Seconds to score so many images' detections, drawn at random around the ground truth."""
    torch.manual_seed(0)
    names = [f"class {index}" for index in range(classes)]
    records, found = [], []
    for index in range(1, images + 1):
        corners = torch.rand(boxes, 4) * 300
        corners[:, 2:] += corners[:, :2] + 5
        labels = torch.randint(0, classes, (boxes,))
        sides = corners[:, 2:] - corners[:, :2]
        crowd = torch.zeros(boxes, dtype=torch.bool)
        records.append(ImageRecord(index, Path(f"{index}.jpg"), _SIDES, corners, labels, crowd, sides.prod(dim=1)))
        chosen = torch.randint(0, boxes, (detections,))
        scores = torch.rand(detections).sort(descending=True).values
        found.append(Detections(corners[chosen] + 8 * torch.randn(detections, 4), scores, labels[chosen]))
    started = time.perf_counter()
    evaluator = CocoEvaluator(records, names)
    for start in range(0, images, 16):
        evaluator.update([record.image_id for record in records[start : start + 16]], found[start : start + 16])
    evaluator.compute()
    return {"images": images, "detections": images * detections, "seconds": time.perf_counter() - started}


def usable_workers() -> int:
    """Processes that this machine can run beside each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
