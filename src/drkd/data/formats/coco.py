"""Reads and validates COCO instance annotations (``instances_*.json``) in one pass."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from drkd.contracts import DrkdError, ImageRecord, PackedMask
from drkd.data.boxes import BoxColumns, Finding, GroupedBoxes, group_boxes
from drkd.data.formats.source import SplitScan, is_file, leads_out, shorten
from drkd.data.masks import pack_segmentation
from drkd.data.problem import DataProblem, Severity, raise_errors
from drkd.data.split import DatasetSplit

_NUMBERS = frozenset({int, float})
# No image has as many px in a row; NaN and the infinities are not below it either.
_HUGE = 10**9
# One image that is missing is none of the folder's fault.
_LOOKED_FOR = 20
# Images without labels are numbered from the largest on, within 64 bits.
_LARGEST_ID = 2**62


def read_coco(annotations: Path, images: Path, *, name: str = "", masks: bool = False) -> DatasetSplit:
    """Read a COCO instances file.

    Boxes that overhang their image are clipped to it, boxes of no area are dropped, segmentations are ignored unless
    asked for, crowds are kept and flagged, images without boxes are kept. Labels are 0..K-1 in the order of category
    ids.

    Args:
        annotations: The JSON file.
        images: The folder that ``file_name`` is relative to.
        name: The split's name; the file's stem without ``instances_`` by default.
        masks: Keep the segmentation of every box, packed; each box must have one then.

    Raises:
        DrkdError: If anything in the file cannot be used; it names the first few records and counts the rest.
    """
    scan = scan_coco(annotations, images, name=name, masks=masks)
    raise_errors(scan.problems, file=annotations)
    return scan.split


def scan_coco(
    annotations: Path, images: Path, *, name: str = "", masks: bool = False, others: Sequence[Path] = ()
) -> SplitScan:
    """Read a COCO instances file and return all that is wrong with it beside all that could be read.

    Args:
        annotations: The JSON file.
        images: The folder that ``file_name`` is relative to.
        name: The split's name; the file's stem without ``instances_`` by default.
        masks: See `read_coco`.
        others: Folders that ``file_name`` may be relative to instead: the first that has the first image is taken.

    Raises:
        DrkdError: If the file cannot be read at all: it is missing, no JSON, or lacks a section.
    """
    annotations, images = Path(annotations), Path(images)
    return _Scanner(annotations, (images, *others), masks=masks).scan(
        name or annotations.stem.removeprefix("instances_")
    )


def _load_json(path: Path, *, masks: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            # Most of COCO is outlines, and most of the memory: what is not asked for goes as soon as it is read.
            document = json.load(file, object_hook=None if masks else _without_outline)
    except FileNotFoundError:
        raise DrkdError(f"{path}: there is no such annotation file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DrkdError(f"{path}: the annotation file cannot be read ({error}).") from None
    except json.JSONDecodeError as error:
        raise DrkdError(
            f"{path}: this is no complete JSON (line {error.lineno}, column {error.colno}: {error.msg}). "
            "The file may be cut short; copy or download it again."
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise DrkdError(f"{path}: the annotation file cannot be read ({str(error).splitlines()[0]}).") from None
    except RecursionError:
        raise DrkdError(f"{path}: the JSON is nested too deeply to be COCO annotations.") from None
    if not isinstance(document, dict):
        raise DrkdError(f"{path}: expected a COCO object with 'images', got a JSON {type(document).__name__}.")
    for section in ("images", "annotations", "categories"):
        if section not in document:
            raise DrkdError(
                f"{path}: the section '{section}' is missing; COCO instance files have all of 'images', "
                f"'annotations' and 'categories', this one has {sorted(document) or 'nothing'}."
            )
        if not isinstance(document[section], list):
            raise DrkdError(f"{path}: the section '{section}' must be a list, got {shorten(document[section])}.")
    return document


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)
    return entry


@dataclass(frozen=True)
class _Images:
    ids: list[int]
    paths: list[Path]
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class _Rows:
    """Annotations that are right by themselves, a row each."""

    ids: list[int]
    images: list[int]
    labels: list[int]
    crowd: list[bool]
    boxes: list[list[float]]
    areas: list[float]
    masks: list[PackedMask]

    def columns(self) -> BoxColumns:
        return BoxColumns(
            np.asarray(self.images, dtype=np.int64),
            np.asarray(self.labels, dtype=np.int64),
            np.asarray(self.crowd, dtype=np.bool_),
            np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4),
            np.asarray(self.areas, dtype=np.float64),
        )


class _Scanner:
    """Holds the findings of one file while it is read."""

    def __init__(self, file: Path, folders: Sequence[Path], *, masks: bool = False) -> None:
        self._file = file
        self._masks = masks
        self._folders = folders
        self._folder = folders[0]
        self._problems: list[DataProblem] = []
        self._without_area: list[int] = []
        self._dropped = 0
        self._clipped = 0

    def scan(self, name: str) -> SplitScan:
        document = _load_json(self._file, masks=self._masks)
        categories = self._scan_categories(document["categories"], document["annotations"])
        images = self._scan_images(document["images"])
        rows = self._scan_annotations(document["annotations"], images, categories)
        boxes = group_boxes(rows.columns(), images.sizes)
        self._report_findings(boxes.findings, rows, images)
        split = DatasetSplit(
            name,
            _records(images, boxes, rows.masks if self._masks else None),
            tuple(categories.values()),
            tuple(categories),
        )
        return SplitScan(split, tuple(self._problems), self._dropped, self._clipped)

    def _report(self, record: str, field: str, message: str, *, severity: Severity = "error") -> None:
        self._problems.append(DataProblem(severity, self._file, record, field, message))

    def _identify(self, row: object, what: str, index: int, seen: set[int]) -> int | None:
        """The row's id if the row is an object with an integer id that is new, else None and a finding."""
        record = f"{what} at position {index}"
        if not isinstance(row, dict):
            self._report(record, "", f"expected a JSON object, got {shorten(row)}")
            return None
        if "id" not in row:
            self._report(record, "id", "is missing")
            return None
        identity = row["id"]
        if type(identity) is not int or not -_LARGEST_ID <= identity <= _LARGEST_ID:
            size = " of at most 2**62" if type(identity) is int else ""
            self._report(record, "id", f"expected an integer{size}, got {shorten(identity)}")
            return None
        if identity in seen:
            self._report(f"{what} {identity}", "id", "is used twice; ids must be unique")
            return None
        seen.add(identity)
        return identity

    def _scan_categories(self, rows: list[Any], entries: list[Any]) -> dict[int, str]:
        """Category id -> name, by ascending id: the position is the label.

        Of two categories of one name one is left out if no annotation has it: exports of Roboflow have a category 0
        above all others, which of a single class has the name of that class.
        """
        found: dict[int, str] = {}
        values = (entry.get("category_id") for entry in entries if isinstance(entry, dict))
        used = {value for value in values if type(value) is int}
        seen: set[int] = set()
        for index, row in enumerate(rows):
            identity = self._identify(row, "category", index, seen)
            if identity is None:
                continue
            name = row.get("name")
            if not isinstance(name, str) or not name.strip():
                self._report(f"category {identity}", "name", f"expected a name, got {shorten(name)}")
                name = f"category {identity}"
            elif (other := next((key for key, known in found.items() if known == name), None)) is not None:
                record, text = f"category {identity}", f"'{name}' is the name of another category too"
                unused = next((key for key in (other, identity) if key not in used), None)
                if unused is None:
                    self._report(record, "name", text)
                else:
                    text += f"; category {unused}, which no annotation has, is left out"
                    self._report(record, "name", text, severity="warning")
                    found.pop(unused, None)
                    if unused == identity:
                        continue
            found[identity] = name
        if not rows:
            self._report("", "categories", "expected at least one category, got an empty list")
        return dict(sorted(found.items()))

    def _scan_images(self, rows: list[Any]) -> _Images:
        found = _Images([], [], [])
        seen: set[int] = set()
        names: dict[Path, int] = {}
        self._folder = _choose_folder(self._folders, rows)
        files = _list_files(self._folder)
        for index, row in enumerate(rows):
            identity = self._identify(row, "image", index, seen)
            if identity is None:
                continue
            record = f"image {identity}"
            size = self._image_size(row, record)
            path = self._image_path(row, record, files)
            found.ids.append(identity)
            found.paths.append(path or self._folder)
            found.sizes.append(size or (0, 0))
            if path is not None and names.setdefault(path, identity) != identity:
                text = f"'{row['file_name']}' is the file of image {names[path]} too"
                self._report(record, "file_name", text, severity="warning")
        if not rows:
            self._report("", "images", "the split is empty: expected at least one image, got an empty list")
        return found

    def _image_size(self, row: dict[str, Any], record: str) -> tuple[int, int] | None:
        values = []
        for field in ("height", "width"):
            value = row.get(field)
            if field not in row:
                self._report(record, field, "is missing")
            elif type(value) is not int or not 0 < value < _HUGE:
                self._report(record, field, f"expected a positive integer, got {shorten(value)}")
            else:
                values.append(value)
        return (values[0], values[1]) if len(values) == 2 else None

    def _image_path(self, row: dict[str, Any], record: str, files: frozenset[str]) -> Path | None:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            self._report(
                record,
                "file_name",
                f"expected a file name, got {shorten(name)}" if "file_name" in row else "is missing",
            )
            return None
        if leads_out(name):
            self._report(record, "file_name", f"'{name}' leads out of the image folder {self._folder}")
            return None
        if "\\" in name and name not in files and not is_file(self._folder / name):
            name = name.replace("\\", "/")  # written on Windows
        path = self._folder / name
        try:
            parts = [len(os.fsencode(part)) for part in Path(name).parts]
        except UnicodeEncodeError:
            self._report(record, "file_name", f"expected a file name, got characters that none can have: {name!a}")
            return None
        if sum(parts) > 4096 or max(parts, default=0) > 255:
            self._report(record, "file_name", f"the name is too long for a file: '{name[:40]}...'")
            return None
        if name not in files and not is_file(path):
            self._report(record, "file_name", f"there is no image file {path}")
        return path

    def _scan_annotations(self, entries: list[Any], images: _Images, categories: dict[int, str]) -> _Rows:
        positions = {identity: position for position, identity in enumerate(images.ids)}
        labels = {identity: label for label, identity in enumerate(categories)}
        seen: set[int] = set()
        rows = _Rows([], [], [], [], [], [], [])
        for index, entry in enumerate(entries):
            identity = self._identify(entry, "annotation", index, seen)
            if identity is None:
                continue
            box, crowd = self._box(entry, identity), entry.get("iscrowd", 0)
            area = self._area(entry, identity, box)
            position = self._look_up(entry, identity, "image_id", positions, "image")
            label = self._look_up(entry, identity, "category_id", labels, "category")
            if crowd not in (0, 1):
                self._report(f"annotation {identity}", "iscrowd", f"expected 0 or 1, got {shorten(crowd)}")
            elif box is not None and area is not None and position is not None and label is not None:
                if self._masks and not self._mask(entry, identity, images.sizes[position], rows):
                    continue
                rows.ids.append(identity)
                rows.images.append(position)
                rows.labels.append(label)
                rows.crowd.append(bool(crowd))
                rows.boxes.append(box)
                rows.areas.append(area)
        if self._without_area:
            count, first = len(self._without_area), self._without_area[0]
            text = f"is 0 in {count} annotations whose boxes have an extent; the area of the box stands in"
            self._report(f"annotation {first}", "area", text, severity="warning")
        if not entries and images.ids:
            self._report("", "annotations", "no image of the split has a box", severity="warning")
        return rows

    def _look_up(self, row: dict[str, Any], identity: int, field: str, known: dict[int, int], what: str) -> int | None:
        value = row.get(field)
        found = known.get(value) if type(value) is int else None
        if found is None:
            if field not in row:
                message = "is missing"
            elif type(value) is not int:
                message = f"expected an integer, got {shorten(value)}"
            else:
                message = f"there is no {what} with id {value}"
            self._report(f"annotation {identity}", field, message)
        return found

    def _box(self, row: dict[str, Any], identity: int) -> list[float] | None:
        box = row.get("bbox")
        if type(box) is list and len(box) == 4 and all(type(value) in _NUMBERS for value in box):
            if not all(-_HUGE < value < _HUGE for value in box):
                self._report(f"annotation {identity}", "bbox", f"expected finite numbers of px, got {shorten(box)}")
            elif box[2] < 0 or box[3] < 0:
                self._report(f"annotation {identity}", "bbox", f"width and height must not be negative, got {box}")
            else:
                return box
        else:
            self._report(
                f"annotation {identity}",
                "bbox",
                "is missing" if "bbox" not in row else f"expected [x, y, width, height], got {shorten(box)}",
            )
        return None

    def _area(self, row: dict[str, Any], identity: int, box: list[float] | None) -> float | None:
        """The annotation's area in px^2; NaN where the box is to stand in for it; None if it is wrong."""
        area = row.get("area")
        if area is None:
            return math.nan
        if type(area) not in _NUMBERS or not 0 <= area < _HUGE**2:
            self._report(f"annotation {identity}", "area", f"expected a finite number >= 0, got {shorten(area)}")
            return None
        if area == 0 and box is not None and box[2] > 0 and box[3] > 0:
            self._without_area.append(identity)
            return math.nan
        return float(area)

    def _mask(self, row: dict[str, Any], identity: int, size: tuple[int, int], rows: _Rows) -> bool:
        """Add the annotation's mask to the rows; False if it has none that can be used."""
        if 0 in size:
            return False
        packed = pack_segmentation(row.get("segmentation"), size)
        if isinstance(packed, str):
            message = (
                f"{packed}, got {shorten(row['segmentation'])}" if "segmentation" in row else f"is missing; {packed}"
            )
            self._report(f"annotation {identity}", "segmentation", message)
            return False
        rows.masks.append(packed)
        return True

    def _report_findings(self, findings: Sequence[tuple[int, Finding]], rows: _Rows, images: _Images) -> None:
        for row, kind in findings:
            height, width = images.sizes[rows.images[row]]
            record, image = f"annotation {rows.ids[row]}", f"its image of {width} x {height} px"
            box = f"box {rows.boxes[row]} (x, y, width, height)"
            if kind == "flat":
                self._dropped += 1
                self._report(record, "bbox", f"{box} has no area; it is left out", severity="warning")
            elif kind == "outside":
                self._report(record, "bbox", f"{box} lies outside {image}")
            else:
                self._clipped += 1
                self._report(record, "bbox", f"{box} overhangs {image}; it is clipped", severity="warning")


def _choose_folder(folders: Sequence[Path], rows: Sequence[Any]) -> Path:
    """The folder that has most of the first few images that the file names; of equals the first."""
    named = [row.get("file_name") for row in rows[:_LOOKED_FOR] if isinstance(row, dict)]
    names = [name for name in named if isinstance(name, str) and name and not leads_out(name)]

    def has(folder: Path, name: str) -> bool:
        return is_file(folder / name) or is_file(folder / name.replace("\\", "/"))

    if all(has(folders[0], name) for name in names):
        return folders[0]
    return max(folders, key=lambda folder: sum(has(folder, name) for name in names))


def _list_files(folder: Path) -> frozenset[str]:
    """Names of the files right in the folder: one listing is far cheaper than 118,000 look-ups."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def _records(images: _Images, boxes: GroupedBoxes, masks: Sequence[PackedMask] | None) -> tuple[ImageRecord, ...]:
    columns = zip(
        images.ids, images.paths, images.sizes, boxes.boxes, boxes.labels, boxes.crowd, boxes.areas, strict=True
    )
    if masks is None:
        return tuple(ImageRecord(*row) for row in columns)
    records = zip((ImageRecord(*row) for row in columns), boxes.rows, strict=True)
    return tuple(replace(record, masks=tuple(masks[place] for place in places.tolist())) for record, places in records)
