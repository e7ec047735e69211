"""Writes Pascal VOC annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from drkd.contracts import DrkdError, ImageRecord
from drkd.data.formats.writing import Writer, WrittenSplit, losses_of_areas, losses_of_ids
from drkd.data.split import DatasetSplit


def write(root: Path, parts: Sequence[WrittenSplit]) -> None:
    """Write ``Annotations/*.xml``, ``ImageSets/Main/SPLIT.txt`` and ``classes.txt``; crowds become difficult.

    Raises:
        DrkdError: If a class name cannot stand in a line of its own.
    """
    names = parts[0].split.class_names
    if wrong := [name for name in names if name != name.strip() or not name.isprintable()]:
        raise DrkdError(
            f"VOC cannot hold the class name {wrong[0]!r}: it begins or ends with a space, or is not printable."
        )
    (root / "Annotations").mkdir()
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    for part in parts:
        stems = [PurePosixPath(name).stem for name in part.names]
        text = "".join(f"{stem}\n" for stem in stems)
        (root / "ImageSets" / "Main" / f"{part.split.name}.txt").write_text(text, encoding="utf-8")
        for record, name, stem in zip(part.split.records, part.names, stems, strict=True):
            (root / "Annotations" / f"{stem}.xml").write_text(_xml(record, name, names), encoding="utf-8")


def _xml(record: ImageRecord, name: str, class_names: Sequence[str]) -> str:
    height, width = record.size
    lines = [
        "<annotation>",
        "  <folder>JPEGImages</folder>",
        f"  <filename>{escape(name)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    columns = (record.boxes.tolist(), record.labels.tolist(), record.crowd.tolist())
    for (left, top, right, bottom), label, crowd in zip(*columns, strict=True):
        # Coordinates count from 1 and include the last pixel.
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (left + 1, top + 1, right, bottom), strict=True)
        lines += [
            "  <object>",
            f"    <name>{escape(class_names[label])}</name>",
            f"    <difficult>{int(crowd)}</difficult>",
            f"    <bndbox>{''.join(f'<{key}>{_write_number(value)}</{key}>' for key, value in corners)}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _write_number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def _losses(split: DatasetSplit) -> list[str]:
    return [*losses_of_areas(split), *losses_of_ids(split)]


WRITER = Writer(folder=lambda _: "JPEGImages", write=write, losses=_losses, flat=True, stems=True)
