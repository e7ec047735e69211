"""Writes YOLO labels and their data.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from drkd.contracts import ImageRecord
from drkd.data.formats.writing import Writer, WrittenSplit, losses_of_areas, losses_of_ids
from drkd.data.formats.yolo import label_path
from drkd.data.split import DatasetSplit


def write(root: Path, parts: Sequence[WrittenSplit]) -> None:
    """Write ``data.yaml`` and ``labels/SPLIT/*.txt``, one for every image, where readers look for it.

    Crowds are left out, and boxes that an image has twice are written once.
    """
    for part in parts:
        for record, name in zip(part.split.records, part.names, strict=True):
            file = root / label_path(Path("images", part.split.name, name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(_lines(record)), encoding="utf-8")
    # Without "path": Ultralytics then takes the file's own folder, wherever it is called from.
    content = {
        **{part.split.name: f"images/{part.split.name}" for part in parts},
        "names": dict(enumerate(parts[0].split.class_names)),
    }
    (root / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _lines(record: ImageRecord) -> list[str]:
    height, width = record.size
    lines = []
    for (left, top, right, bottom), label, crowd in zip(
        record.boxes.tolist(), record.labels.tolist(), record.crowd.tolist(), strict=True
    ):
        if not crowd:
            box = (
                (left + right) / 2 / width,
                (top + bottom) / 2 / height,
                (right - left) / width,
                (bottom - top) / height,
            )
            # In full: what is read back is the same box to the last bit of its float32.
            lines.append(f"{label} {' '.join(repr(value) for value in box)}\n")
    return list(dict.fromkeys(lines))


def _losses(split: DatasetSplit) -> list[str]:
    crowds = sum(int(record.crowd.sum()) for record in split.records)
    lost = [f"{crowds} crowd or difficult boxes: YOLO has no such flag; they are left out"] if crowds else []
    twice = sum(int((~record.crowd).sum()) - len(_lines(record)) for record in split.records)
    lost += [f"{twice} boxes that an image has twice: readers of YOLO take them once"] if twice else []
    return [*lost, *losses_of_areas(split), *losses_of_ids(split)]


WRITER = Writer(
    folder=lambda split: f"images/{split}",
    write=write,
    losses=_losses,
    count=lambda record: len(_lines(record)),
    stems=True,
    shown=True,
    listed=True,
)
