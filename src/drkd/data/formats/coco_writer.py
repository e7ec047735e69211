"""Writes COCO annotations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drkd.data.formats.writing import Writer, WrittenSplit


def write(root: Path, parts: Sequence[WrittenSplit]) -> None:
    """Write ``annotations/instances_SPLIT.json``; category ids are the data's own where it has some, else 1..K."""
    (root / "annotations").mkdir()
    for part in parts:
        text = json.dumps(_document(part), separators=(",", ":"))
        (root / "annotations" / f"instances_{part.split.name}.json").write_text(text + "\n", encoding="utf-8")


def _document(part: WrittenSplit) -> dict[str, Any]:
    split = part.split
    ids = split.numbered_categories()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record, name in zip(split.records, part.names, strict=True):
        height, width = record.size
        images.append({"id": record.image_id, "file_name": name, "height": height, "width": width})
        columns = (record.boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), record.areas.tolist())
        for (left, top, right, bottom), label, crowd, area in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": ids[split.class_names[label]],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": ids[name], "name": name} for name in split.class_names]
    return {"images": images, "annotations": annotations, "categories": categories}


WRITER = Writer(folder=lambda split: split, write=write, losses=lambda split: [])
