"""What every format reader takes and returns: where a split is described, and what one pass over it found."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from drkd.contracts import DrkdError, ImageRecord, Size
from drkd.data.boxes import BoxColumns, group_boxes
from drkd.data.problem import DataProblem, Severity
from drkd.data.split import DatasetSplit

FormatName = Literal["coco", "yolo", "voc"]
"""A format that is read and written."""

_SYNONYMS = {"valid": "val", "validation": "val", "training": "train"}


@dataclass(frozen=True)
class SplitSource:
    """Where one split of a data set is described.

    Args:
        format: The format.
        name: The split: train, tune, val or test (VOC also has trainval).
        root: The data set's folder.
        file: The file that describes it: COCO's JSON, YOLO's data.yaml, VOC's list of images, or, where VOC has none,
            the folder of its XML files.
        images: The folder of its images; of several, the first.
        absent: What of a split that one need not have (tune or test) is not there, so that nothing is; empty where
            something is. Such a split is an error only where it is asked for.
        class_file: The file of VOC that lists the classes, where there is one.
    """

    format: FormatName
    name: str
    root: Path
    file: Path
    images: Path
    absent: str = ""
    class_file: Path | None = None


@dataclass(frozen=True)
class SplitScan:
    """What one pass over a split found.

    Args:
        split: All that could be read: records without the boxes that have a problem of their own.
        problems: Every finding, errors and warnings.
        dropped: Boxes left out because they have no area.
        clipped: Boxes cut at the image's border because they overhang it by more than a pixel.
        without_labels: Images that have no label file, in formats that have one for each image (YOLO).
        unreadable: By image whose header cannot be read and whose size nothing else says, the error among the problems.
    """

    split: DatasetSplit
    problems: tuple[DataProblem, ...]
    dropped: int
    clipped: int
    without_labels: tuple[Path, ...] = ()
    unreadable: Mapping[Path, DataProblem] = field(default_factory=dict)


@dataclass
class BoxRows:
    """Boxes of many images as they are read, a row each, with where each was found.

    Attributes:
        images: Position of the image.
        labels: Label.
        ignored: Whether it neither trains nor counts.
        boxes: x, y, width, height, px.
        files: File that the box was found in.
        places: Where in it, for messages ("line 3").
    """

    images: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: list[bool] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def add(self, image: int, label: int, box: list[float], *, file: Path, place: str, ignored: bool = False) -> None:
        """Add a box."""
        self.images.append(image)
        self.labels.append(label)
        self.ignored.append(ignored)
        self.boxes.append(box)
        self.files.append(file)
        self.places.append(place)


class Findings:
    """Collects what is wrong with a split while it is read.

    Attributes:
        problems: Every finding so far.
        dropped: Boxes left out because they have no area.
        clipped: Boxes cut at their image's border.
        without_labels: Images that have no label file.
        unreadable: By image whose header cannot be read, the error.
    """

    def __init__(self) -> None:
        self.problems: list[DataProblem] = []
        self.dropped = 0
        self.clipped = 0
        self.without_labels: list[Path] = []
        self.unreadable: dict[Path, DataProblem] = {}

    def report(self, file: Path, record: str, field: str, message: str, *, severity: Severity = "error") -> None:
        """Add a finding."""
        self.problems.append(DataProblem(severity, file, record, field, message))

    def report_unreadable(self, image: Path, file: Path, record: str, error: DrkdError) -> None:
        """Add the error of an image whose header cannot be read."""
        self.report(file, record, "", str(error).removeprefix(f"{image}: "))
        self.unreadable[image] = self.problems[-1]

    def make_records(
        self, paths: Sequence[Path], sizes: Sequence[Size], rows: BoxRows, *, box_field: str, turned: bool
    ) -> tuple[ImageRecord, ...]:
        """Clip and group the boxes, report those that were not simply taken over, and number the images from 1."""
        columns = BoxColumns(
            np.asarray(rows.images, dtype=np.int64),
            np.asarray(rows.labels, dtype=np.int64),
            np.asarray(rows.ignored, dtype=np.bool_),
            np.asarray(rows.boxes, dtype=np.float64).reshape(-1, 4),
            np.full(len(rows.images), np.nan),
        )
        grouped = group_boxes(columns, sizes)
        for row, kind in grouped.findings:
            height, width = sizes[rows.images[row]]
            x, y, box_width, box_height = (round(value, 3) for value in rows.boxes[row])
            text = f"box of {box_width:g} x {box_height:g} px at ({x:g}, {y:g})"
            image = f"its image of {width} x {height} px"
            where = rows.files[row], rows.places[row], box_field
            if kind == "flat":
                self.dropped += 1
                self.report(*where, f"{text} has no area; it is left out", severity="warning")
            elif kind == "outside":
                self.report(*where, f"{text} lies outside {image}")
            else:
                self.clipped += 1
                self.report(*where, f"{text} overhangs {image}; it is clipped", severity="warning")
        columns_of_images = zip(paths, sizes, grouped.boxes, grouped.labels, grouped.crowd, grouped.areas, strict=True)
        return tuple(
            ImageRecord(number, path, size, boxes, labels, crowd, areas, turned=turned)
            for number, (path, size, boxes, labels, crowd, areas) in enumerate(columns_of_images, start=1)
        )

    def finish(self, split: DatasetSplit) -> SplitScan:
        """What was found, with the split."""
        return SplitScan(
            split,
            tuple(self.problems),
            self.dropped,
            self.clipped,
            without_labels=tuple(self.without_labels),
            unreadable=self.unreadable,
        )


def split_name(stem: str) -> str | None:
    """The split that a file or folder name stands for: "train2017" is train, "valid" is val; None for another name."""
    match = re.fullmatch(r"(training|train|tune|validation|valid|val|test)[-_]?\d*", stem)
    return _SYNONYMS.get(match[1], match[1]) if match else None


def leads_out(name: str) -> bool:
    """Whether a file name that a data set gives is absolute or climbs out of its folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    # On Windows a name may also begin with a drive alone.
    return parts.is_absolute() or ".." in parts.parts or bool(Path(name).anchor) or "\0" in name


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that is too long for one names none."""
    return _ask(path.is_file)


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name that is too long for one names none."""
    return _ask(path.is_dir)


def _ask(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def shorten(value: object) -> str:
    """Type and value for a message, cut to one line."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
