"""Writes a data set in another format, images and all, at once or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from drkd.contracts import DrkdError, ImageRecord
from drkd.data.dataset import keep_classes, map_classes
from drkd.data.formats import coco_writer, voc_writer, yolo_writer
from drkd.data.formats.reading import FormatChoice, find_sources, read_source, scan_source
from drkd.data.formats.source import FormatName, SplitSource
from drkd.data.formats.writing import Writer, WrittenSplit
from drkd.data.image import IMAGE_SUFFIXES, choose_suffix
from drkd.data.image_check import check_images
from drkd.data.orientation import as_shown, as_stored
from drkd.data.problem import DataProblem, raise_errors
from drkd.data.split import DatasetSplit

_WRITERS: Mapping[FormatName, Writer] = {
    "coco": coco_writer.WRITER,
    "yolo": yolo_writer.WRITER,
    "voc": voc_writer.WRITER,
}
_BESIDE_BOXES: Mapping[FormatName, str] = {
    "coco": "masks, key points, annotation ids and fields of your own: boxes, classes, crowd flags and areas are kept",
    "yolo": "polygons, oriented boxes and key points: only their bounding boxes are kept",
    "voc": "pose, truncation, parts and fields of your own: boxes, classes and the flag difficult are kept",
}

# Images that are damaged or of another size than annotated: named at once, so that they can be mended at once.
_SHOWN = 20


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        target: The new data set's folder.
        images: By split, the number of images.
        boxes: By split, the number of boxes that were read.
        lost: What the new data set does not hold, a line each.
    """

    target: Path
    images: Mapping[str, int]
    boxes: Mapping[str, int]
    lost: tuple[str, ...]


def convert(
    source: Path,
    target: Path,
    *,
    to: FormatName,
    images: Literal["copy", "link"] = "copy",
    format: FormatChoice = "auto",
    classes: Sequence[str] | None = None,
) -> Converted:
    """Write a data set in another format, or in its own with fewer classes.

    Before anything is written every image is looked at as `check_data` does: a data set that it rejects is not written.
    Everything is written beside the target, read back, and renamed when all is there. Images keep their names, unless
    two would have one name in the new format, or readers of the format would not take one for an image.

    Args:
        source: The data set's folder.
        target: Folder to write; must not exist, or be empty.
        to: The new format.
        images: Copy the images, or link to them (symbolic links to where they are now).
        format: The format of the source; by default the one that is found.
        classes: Keep the boxes of these classes only, in this order.

    Raises:
        DrkdError: If the source cannot be read or has errors, among them images that are damaged or of another size
            than annotated, the target cannot be written, or what was written does not read back with as many images
            and boxes.
    """
    source, target = Path(source), Path(target)
    _check_target(source, target)
    found = find_sources(source, format=format)
    # Splits that are made of others would bring their images in twice.
    chosen = {
        name: entry
        for name, entry in found.items()
        if not entry.absent and (name != "trainval" or "train" not in found)
    }
    if not chosen:
        raise DrkdError(f"{source}: no split that its files name is there: {next(iter(found.values())).absent}.")
    splits, lost = _read(chosen, classes)
    lost += [f"{name}: the split: {entry.absent}" for name, entry in found.items() if entry.absent]
    writer = _WRITERS[to]
    place = as_shown if writer.shown else as_stored
    splits = [replace(split, records=tuple(place(record) for record in split.records)) for split in splits]
    if to != "voc":
        # No other format has a split of that name; and none trains on what it validates on.
        splits, shared = _part_trainval(splits, source)
        lost += shared
    kind = next(iter(chosen.values())).format
    for split in splits:
        lost += [f"{split.name}: {line}" for line in writer.losses(split)]
    names = _choose_names(splits, [entry.images for entry in chosen.values()], writer)
    parts = [WrittenSplit(split, tuple(entry)) for split, entry in zip(splits, names, strict=True)]
    _write(target, parts, writer, images, to)
    return Converted(
        target,
        {split.name: len(split) for split in splits},
        {split.name: sum(len(record.labels) for record in split.records) for split in splits},
        (_BESIDE_BOXES[kind], *lost),
    )


def _part_trainval(splits: Sequence[DatasetSplit], source: Path) -> tuple[list[DatasetSplit], list[str]]:
    """VOC's trainval as the split train, without the images that other splits have; and what was left out."""
    elsewhere = {record.path for split in splits if split.name != "trainval" for record in split.records}
    parted, lost = [], []
    for split in splits:
        if split.name != "trainval":
            parted.append(split)
            continue
        kept = tuple(record for record in split.records if record.path not in elsewhere)
        if not kept:
            raise DrkdError(
                f"{source}: every image of its list trainval is in another split too, so there is nothing to train on."
            )
        if left := len(split.records) - len(kept):
            lost.append(f"train: {left} of the {len(split.records)} images of trainval, which other splits have too")
        parted.append(replace(split, name="train", records=kept))
    return parted, lost


def _check_target(source: Path, target: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise DrkdError(f"{target}: exists already and is not empty; choose another folder, or remove it first.")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise DrkdError(f"{target}: lies within the data set {source}; choose a folder outside.")


def _read(sources: Mapping[str, SplitSource], classes: Sequence[str] | None) -> tuple[list[DatasetSplit], list[str]]:
    splits: dict[str, DatasetSplit] = {}
    lost: list[str] = []
    # Whose classes the others follow: what is trained on, as `check_data` has it, and not what comes first by name.
    reference = next((name for name in ("train", "trainval") if name in sources), next(iter(sources)))
    names: tuple[str, ...] = ()
    damaged: list[DataProblem] = []
    for name in (reference, *(name for name in sources if name != reference)):
        entry = sources[name]
        scan = scan_source(entry)
        raise_errors(scan.problems, file=entry.file)
        damaged += check_images(scan.split, entry.file)
        if scan.dropped or scan.clipped:
            lost.append(
                f"{name}: {scan.dropped} boxes without area; what {scan.clipped} boxes overhang their images by"
            )
        split = scan.split if classes is None else keep_classes(scan.split, classes, source=entry.file, known=names)
        splits[name] = map_classes(split, names, source=entry.file) if names else split
        names = splits[reference].class_names
    if damaged:
        raise_errors(damaged, file=damaged[0].file, shown=_SHOWN)
    if classes is not None:
        lost.append(f"boxes of other classes than {', '.join(classes)}")
    return [splits[name] for name in sources], lost


def _choose_names(splits: Sequence[DatasetSplit], folders: Sequence[Path], writer: Writer) -> list[list[str]]:
    """The images' paths in the target: their own, made different where the format needs it."""
    wanted = [
        [_own_name(record, folder, writer) for record in split.records]
        for split, folder in zip(splits, folders, strict=True)
    ]
    if writer.flat:
        keys = [{_key(name, writer) for name in names} for names in wanted]
        if len(set().union(*keys)) < sum(len(entry) for entry in keys):
            wanted = [[f"{split.name}_{name}" for name in names] for split, names in zip(splits, wanted, strict=True)]
    taken: set[str] = set()
    chosen = []
    for names in wanted:
        taken = taken if writer.flat else set()
        chosen.append([_make_free(name, taken, writer) for name in names])
    return chosen


def _own_name(record: ImageRecord, folder: Path, writer: Writer) -> str:
    # Without "..", which would lead out of the folder that the name is written under.
    path, within = Path(os.path.normpath(record.path)), Path(os.path.normpath(folder))
    parts = path.relative_to(within).parts if path.is_relative_to(within) else (path.name,)
    parts = (path.name,) if ".." in parts else parts
    if writer.listed:
        visible = f"_{parts[-1]}" if parts[-1].startswith(".") else parts[-1]
        known = PurePosixPath(visible).suffix.lower() in IMAGE_SUFFIXES
        parts = (*parts[:-1], visible if known else f"{visible}{choose_suffix(record.path)}")
    return ("_" if writer.flat else "/").join(parts)


def _key(name: str, writer: Writer) -> str:
    # Folded: some file systems do not tell A from a.
    return (str(PurePosixPath(name).with_suffix("")) if writer.stems else name).casefold()


def _make_free(name: str, taken: set[str], writer: Writer) -> str:
    path, number = PurePosixPath(name), 1
    while (key := _key(str(path), writer)) in taken:
        number += 1
        path = PurePosixPath(name).with_stem(f"{PurePosixPath(name).stem}_{number}")
    taken.add(key)
    return str(path)


def _write(
    target: Path, parts: Sequence[WrittenSplit], writer: Writer, images: Literal["copy", "link"], to: FormatName
) -> None:
    aside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        for part in parts:
            folder = aside / writer.folder(part.split.name)
            folder.mkdir(parents=True, exist_ok=True)
            for record, name in zip(part.split.records, part.names, strict=True):
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                if images == "link":
                    file.symlink_to(record.path.resolve())
                else:
                    shutil.copyfile(record.path, file)
        writer.write(aside, parts)
        _read_back(aside, target, parts, writer, to)
        # mkdtemp makes private folders; a data set is to be shared like any other output.
        aside.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        raise DrkdError(f"{target}: the data set cannot be written there ({error}).") from None
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _read_back(aside: Path, target: Path, parts: Sequence[WrittenSplit], writer: Writer, to: FormatName) -> None:
    """Insist that every image and box that was written is found again."""
    for part in parts:
        try:
            source = find_sources(aside, format=to).get(part.split.name)
            # One split at a time: the source's records are held beside it.
            read = () if source is None else read_source(source).records
        except DrkdError as error:
            reason = str(error).replace(str(aside), str(target))
            raise DrkdError(f"What was written does not read back, so it was not kept: {reason}") from None
        ours = len(part.names), sum(writer.count(record) for record in part.split.records)
        theirs = len(read), sum(len(record.labels) for record in read)
        if ours != theirs:
            raise DrkdError(
                f"{target}: what was written does not read back, so it was not kept: split '{part.split.name}': "
                f"expected {ours[0]} images and {ours[1]} boxes, found {theirs[0]} and {theirs[1]}. Do names or boxes "
                f"of the source have something that {to.upper()} cannot hold?"
            )
