"""Finds out which format a data set folder has, and reads its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from drkd.contracts import DrkdError
from drkd.data.formats import coco_layout, voc, yolo
from drkd.data.formats.source import FormatName, SplitScan, SplitSource, is_file, is_folder
from drkd.data.problem import LeaveOut, leave_out_some, raise_errors
from drkd.data.records import PackedRecords
from drkd.data.split import DatasetSplit

FormatChoice = Literal["auto", "coco", "yolo", "voc"]
"""A format, or ``auto``: the one that the folder's content shows."""

Find = Callable[[Path], dict[str, SplitSource]]
Scan = Callable[[SplitSource], SplitScan]
LabelFiles = Callable[[SplitSource], list[Path]]

# A format is a module with these three functions; a new one is a line here.
_FORMATS: Mapping[FormatName, tuple[Find, Scan, LabelFiles]] = {
    "coco": (coco_layout.find, coco_layout.scan, coco_layout.label_files),
    "yolo": (yolo.find, yolo.scan, yolo.label_files),
    "voc": (voc.find, voc.scan, voc.label_files),
}
_EXPECTED: Mapping[FormatName, str] = {"coco": coco_layout.EXPECTED, "yolo": yolo.EXPECTED, "voc": voc.EXPECTED}


class NoAnnotations(DrkdError):
    """A folder holds nothing that looks like a data set; any other fault is of one that is there."""


def find_sources(root: Path, *, format: FormatChoice = "auto") -> dict[str, SplitSource]:
    """Find the splits of a data set.

    Args:
        root: The data set's folder; for YOLO also its data.yaml.
        format: Its format; by default the one that is found.

    Raises:
        DrkdError: If there is no such folder, no split in it, or files of several formats.
    """
    root = Path(root)
    if not is_folder(root) and not (is_file(root) and root.suffix.lower() in (".yaml", ".yml")):
        raise DrkdError(f"{root}: there is no such folder; expected a data set in COCO, YOLO or VOC format.")
    chosen = {name: entry for name, entry in _FORMATS.items() if format in ("auto", name)}
    if not chosen:
        raise DrkdError(f"data.format: expected auto, {', '.join(_FORMATS)}, got {format!r}.")
    found: dict[FormatName, dict[str, SplitSource]] = {}
    # YOLO's last: many a folder has a data.yaml of another kind.
    for name in sorted(chosen, key=lambda name: name == "yolo"):
        if name == "yolo" and found and yolo.means_something_else(root):
            continue
        if sources := chosen[name][0](root):
            found[name] = sources
    if len(found) > 1:
        kinds = ", ".join(name for name in chosen if name in found)
        raise DrkdError(
            f"{root}: holds files of several formats ({kinds}). Name one: data.format in a recipe, "
            "--format on the command line."
        )
    if not found:
        expected = "; ".join(_EXPECTED[name] for name in chosen)
        *others, last = (name.upper() for name in chosen)
        kinds = f"{', '.join(others)} or {last}" if others else last
        raise NoAnnotations(f"{root}: no {kinds} annotations found. Expected {expected}.")
    return next(iter(found.values()))


def holds_data_set(folder: Path, *, format: FormatChoice = "auto") -> bool:
    """Whether there is a data set, also one that is faulty or of several formats."""
    if not is_folder(folder) or format not in ("auto", *_FORMATS):
        return False
    try:
        return bool(find_sources(folder, format=format))
    except NoAnnotations:
        return False
    except (DrkdError, OSError):
        # A data.yaml of another kind is found too, and refused for what it lacks.
        return not yolo.means_something_else(folder)


def scan_source(source: SplitSource) -> SplitScan:
    """Read a split and return all that is wrong with it beside all that could be read.

    Raises:
        DrkdError: If it cannot be read at all.
    """
    return _FORMATS[source.format][1](source)


def list_label_files(source: SplitSource) -> list[Path]:
    """The files with a split's boxes, beside the one that describes it; none where that one has them.

    Raises:
        DrkdError: If that one cannot be read.
    """
    return _FORMATS[source.format][2](source)


def read_source(source: SplitSource, *, masks: bool = False, leave_out: LeaveOut | None = None) -> DatasetSplit:
    """Read a split.

    Args:
        source: The split.
        masks: Keep the instances' masks.
        leave_out: Called for each image whose header cannot be read and whose size nothing else says; it is then left
            out, unless those are many (`leave_out_some`). By default it is an error.

    Raises:
        DrkdError: If anything in it cannot be used; it names the first few records and counts the rest. If masks are
            asked for of a format that has none.
    """
    if masks and source.format != "coco":
        raise DrkdError(
            f"{source.file}: instance masks, which this student trains (Mask R-CNN), are read from COCO annotations "
            f"only, got {source.format.upper()}. Add segmentations in COCO format, or choose a student without masks."
        )
    scan = coco_layout.scan(source, masks=True) if masks else scan_source(source)
    if leave_out is None or not 0 < len(scan.unreadable) < len(scan.split):
        raise_errors(scan.problems, file=source.file)
        return scan.split
    unreadable = {id(problem) for problem in scan.unreadable.values()}
    raise_errors([problem for problem in scan.problems if id(problem) not in unreadable], file=source.file)
    reasons = {path: problem.message for path, problem in scan.unreadable.items()}
    leave_out_some(reasons, len(scan.split), leave_out)
    kept = PackedRecords(record for record in scan.split.records if record.path not in scan.unreadable)
    return replace(scan.split, records=kept)
