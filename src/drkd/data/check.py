"""Looks a data set over: everything that is wrong with it at once, what it holds, and a picture of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from drkd.contracts import DrkdError, ImageRecord
from drkd.data.formats.reading import FormatChoice, find_sources, scan_source
from drkd.data.formats.source import FormatName, SplitScan
from drkd.data.image_check import DECODED, check_images, count_decoded
from drkd.data.picture import DEFAULT_PICTURE, check_picture, draw_samples, save_picture
from drkd.data.problem import DataProblem
from drkd.data.split import DatasetSplit

__all__ = ["DataReport", "SplitReport", "check_data", "draw_samples"]

_SPLITS = ("train", "tune", "val", "test")
_SMALL, _MEDIUM = 32.0**2, 96.0**2


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Args:
        name: The split.
        annotations: Its annotation file.
        images: Number of images.
        empty_images: Images without a box.
        boxes: Number of usable boxes, crowds among them.
        crowds: Boxes that stand for a crowd.
        dropped: Boxes left out because they have no area.
        clipped: Boxes that were cut at their image's border.
        boxes_per_class: By class name, in the order of the labels.
        boxes_per_size: Boxes whose area is "small" (< 32^2 px^2 of the stored image), "medium" (< 96^2) and "large".
        boxes_per_image: By number of boxes, how many images have that many; ascending.
        backgrounds: By background, how many images show it, where the data set says so (as ``digits`` does).
        format: The format that it was read from.
        decoded: Images that were decoded in full; of the others the header was read.
        without_labels: Images without a label file, in formats that have one for each image (YOLO).
    """

    name: str
    annotations: Path
    images: int
    empty_images: int
    boxes: int
    crowds: int
    dropped: int
    clipped: int
    boxes_per_class: Mapping[str, int]
    boxes_per_size: Mapping[str, int]
    boxes_per_image: Mapping[int, int]
    backgrounds: Mapping[str, int]
    format: FormatName
    decoded: int = 0
    without_labels: int = 0


@dataclass(frozen=True)
class DataReport:
    """What a data set holds and what is wrong with it.

    Args:
        root: The data set's folder.
        splits: One entry a split that could be read.
        problems: Everything found, by split in the order of the file.
        picture: Where the picture of samples was written, if it was.
    """

    root: Path
    splits: tuple[SplitReport, ...]
    problems: tuple[DataProblem, ...]
    picture: Path | None = None

    @property
    def errors(self) -> tuple[DataProblem, ...]:
        """What keeps the data from being used."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def warnings(self) -> tuple[DataProblem, ...]:
        """What was handled but is worth a look."""
        return tuple(problem for problem in self.problems if problem.severity == "warning")

    def __str__(self) -> str:
        parts = [f"{self.root}", *(_describe(split) for split in self.splits)]
        parts.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings" + (":" if self.problems else ""))
        parts.extend(f"  {problem}" for problem in self.problems)
        if self.picture is not None:
            parts.append(f"samples: {self.picture}")
        return "\n".join(parts)


def check_data(
    root: Path,
    *,
    splits: Sequence[str] | None = None,
    picture: Path | None = None,
    decode: int | Literal["all"] = DECODED,
    format: FormatChoice = "auto",
) -> DataReport:
    """Look a data set over.

    Args:
        root: The data set's folder.
        splits: Which splits; all that are found by default.
        picture: Where to write a picture (PNG) of samples with their boxes; replaces an earlier one, nothing else.
        decode: So many images of each split, evenly spaced, or all, are decoded in full; of the others only the header
            is read.
        format: The data's format; by default the one that is found.

    Raises:
        DrkdError: If there is no data set in the folder, a split that was asked for is not there, or something else is
            where the picture is to be written.
    """
    root = Path(root)
    if picture is not None:
        check_picture(Path(picture))
    found = find_sources(root, format=format)
    chosen = list(splits) if splits is not None else _all_splits(found)
    if missing := [name for name in chosen if name not in found]:
        raise DrkdError(f"{root}: there is no split '{missing[0]}'; this folder has {', '.join(sorted(found))}.")
    problems: list[DataProblem] = []
    reports: list[SplitReport] = []
    scans: dict[str, SplitScan] = {}
    for name in chosen:
        annotations = found[name].file
        if splits is None and found[name].absent:
            text = f"{found[name].absent}; the split is left out"
            problems.append(DataProblem("warning", annotations, "", name, text))
            continue
        try:
            scan = scan_source(found[name])
        except DrkdError as error:
            text = str(error).removeprefix(f"{annotations}: ")
            problems.append(DataProblem("error", annotations, "", "", text))
            continue
        problems.extend(scan.problems)
        problems.extend(check_images(scan.split, annotations, decode=decode))
        problems.extend(_check_classes(scan.split, annotations))
        problems.extend(_check_label_files(scan, annotations))
        scans[name] = scan
        reports.append(_count(scan, annotations, found[name].format, decode))
    problems.extend(_compare(scans, {name: found[name].file for name in scans}))
    drawn = None
    if picture is not None and any(scan.split.records for scan in scans.values()):
        try:
            drawn = save_picture(draw_samples([scan.split for scan in scans.values()]), Path(picture))
        except DrkdError as error:
            if Path(picture) != Path(DEFAULT_PICTURE):
                raise
            # Nobody asked for it: what was found is not lost for want of a picture.
            problems.append(DataProblem("warning", Path(picture), "", "", str(error).removeprefix(f"{picture}: ")))
    return DataReport(root, tuple(reports), tuple(problems), drawn)


def _all_splits(found: Collection[str]) -> list[str]:
    # VOC's trainval is made of train and val: where it stands in for train, val is among it.
    names = (
        ("train", "tune", "val", "test")
        if "trainval" not in found or "train" in found
        else ("trainval", "tune", "test")
    )
    return [name for name in names if name in found]


def _check_classes(split: DatasetSplit, annotations: Path) -> list[DataProblem]:
    """Names that differ in case or spaces only, and classes that nothing is trained on."""
    texts = []
    alike: dict[str, list[str]] = {}
    for name in split.class_names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    texts += [
        f"{' and '.join(map(repr, names))} are classes of their own; is one misspelt?"
        for names in alike.values()
        if len(names) > 1
    ]
    if split.name.startswith("train") and split.class_names:
        seen = set(_join([record.labels for record in split.records], torch.int64).tolist())
        empty = [name for label, name in enumerate(split.class_names) if label not in seen]
        if empty:
            texts.append(f"no box to train on: {', '.join(map(repr, empty[:20]))}{', ...' if len(empty) > 20 else ''}")
    return [DataProblem("warning", annotations, "", "categories", text) for text in texts]


def _check_label_files(scan: SplitScan, annotations: Path) -> list[DataProblem]:
    """Images without a label file are background; so are those whose file went missing, which only a count shows."""
    missing, total = scan.without_labels, len(scan.split)
    if not missing or len(missing) == total:  # of none at all the reader makes an error
        return []
    text = (
        f"{len(missing)} of {total} images have no label file (first: {missing[0]}); they count as images without boxes"
    )
    return [DataProblem("warning", annotations, "", scan.split.name, text)]


def _compare(scans: Mapping[str, SplitScan], files: Mapping[str, Path]) -> list[DataProblem]:
    """What only shows when splits are seen together: other classes, and images that train and test alike."""
    if len(scans) < 2:
        return []
    (first, reference), *others = scans.items()
    names = reference.split.class_names
    paths = {record.path.resolve(): first for record in reference.split.records}
    problems = []
    for name, scan in others:
        theirs = scan.split.class_names
        if unknown := [entry for entry in theirs if entry not in names]:
            text = (
                f"{', '.join(map(repr, unknown))}: not among the classes of '{first}' ({', '.join(map(repr, names))})"
            )
            problems.append(DataProblem("error", files[name], "", "categories", text))
        elif theirs != names:
            text = f"'{first}' has {len(names)} classes, '{name}' has {len(theirs)} or another order; mapped by name"
            problems.append(DataProblem("warning", files[name], "", "categories", text))
        for record in scan.split.records:
            other = paths.setdefault(record.path.resolve(), name)
            if other != name and record.path.is_file():
                text = f"{record.path.name} is in the split '{other}' too: results on '{name}' would be too good"
                problems.append(DataProblem("warning", files[name], f"image {record.image_id}", "file_name", text))
    return problems


def _count(scan: SplitScan, annotations: Path, format: FormatName, decode: int | Literal["all"]) -> SplitReport:
    records, names = scan.split.records, scan.split.class_names
    labels = _join([record.labels for record in records], torch.int64)
    areas = _join([record.areas for record in records], torch.float32)
    per_class = torch.bincount(labels, minlength=len(names)).tolist()
    small, medium = int((areas < _SMALL).sum()), int((areas < _MEDIUM).sum())
    per_image = Counter(len(record.labels) for record in records)
    return SplitReport(
        name=scan.split.name,
        annotations=annotations,
        images=len(records),
        empty_images=per_image[0],
        boxes=len(labels),
        crowds=sum(int(record.crowd.sum()) for record in records),
        dropped=scan.dropped,
        clipped=scan.clipped,
        boxes_per_class=dict(zip(names, per_class, strict=True)),
        boxes_per_size={"small": small, "medium": medium - small, "large": len(areas) - medium},
        boxes_per_image=dict(sorted(per_image.items())),
        backgrounds=_count_backgrounds(annotations, records) if format == "coco" else {},
        format=format,
        decoded=count_decoded(len(records), decode),
        without_labels=len(scan.without_labels),
    )


def _join(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)


def _count_backgrounds(annotations: Path, records: Sequence[ImageRecord]) -> dict[str, int]:
    # Only the embedded data set says; do not read a big file twice to learn that it does not.
    if len(records) > 20_000:
        return {}
    rows = json.loads(annotations.read_bytes())["images"]
    found = Counter(str(row["background"]) for row in rows if isinstance(row, dict) and "background" in row)
    return dict(sorted(found.items()))


def _describe_empty(split: SplitReport) -> str:
    beside = f", {split.without_labels} of them without a label file" if split.without_labels else ""
    return f"{split.empty_images} without boxes{beside}"


def _describe(split: SplitReport) -> str:
    lines = [
        f"{split.name} ({split.format.upper()}): {split.images} images ({_describe_empty(split)}), "
        f"{split.boxes} boxes ({split.crowds} crowds), {split.boxes / max(split.images, 1):.1f} an image, "
        f"at most {max(split.boxes_per_image, default=0)}",
        "  sizes (COCO's, px of the stored images): "
        + ", ".join(f"{name} {count}" for name, count in split.boxes_per_size.items()),
        "  classes: " + ", ".join(f"{name} {count}" for name, count in split.boxes_per_class.items()),
    ]
    if split.decoded < split.images:
        lines.append(f"  decoded {split.decoded} of {split.images} images, of the others the headers")
    if split.dropped or split.clipped:
        lines.append(f"  handled: {split.dropped} boxes without area left out, {split.clipped} clipped to their image")
    if split.backgrounds:
        lines.append("  backgrounds: " + ", ".join(f"{name} {count}" for name, count in split.backgrounds.items()))
    return "\n".join(lines)
