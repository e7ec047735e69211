"""Finds COCO annotation files and the folders of their images."""

from __future__ import annotations

import re
from pathlib import Path

from drkd.contracts import DrkdError
from drkd.data.formats.coco import scan_coco
from drkd.data.formats.source import SplitScan, SplitSource, split_name

EXPECTED = (
    "COCO: annotations/instances_train*.json (images in train*/ or images/train*/) or train/_annotations.coco.json, "
    "and the same for val"
)


def find(root: Path) -> dict[str, SplitSource]:
    """Find the splits of a COCO-format folder; none where the folder is of another format.

    Two layouts are known: ``annotations/instances_SPLIT*.json`` with images in ``SPLIT*/``, ``images/SPLIT*/`` or
    ``images/`` (COCO), and ``SPLIT/_annotations.coco.json`` beside the images (Roboflow). SPLIT is train, tune, val
    (or valid) or test.

    Raises:
        DrkdError: If there are two files for one split.
    """
    if not root.is_dir():
        return {}
    found: dict[str, SplitSource] = {}
    candidates = [
        (file, re.sub(r"^instances_", "", file.stem)) for file in sorted((root / "annotations").glob("*.json"))
    ]
    candidates += [(file, file.parent.name) for file in sorted(root.glob("*/_annotations.coco.json"))]
    for file, stem in candidates:
        split = split_name(stem)
        if split is None:
            continue
        if split in found:
            raise DrkdError(
                f"{root}: two annotation files for the split '{split}': {found[split].file} and {file}. Keep one of "
                "them in the folder."
            )
        found[split] = SplitSource("coco", split, root, file, _image_folder(root, file, stem))
    return found


def label_files(source: SplitSource) -> list[Path]:
    """None: the file that describes a split holds its boxes."""
    return []


def scan(source: SplitSource, *, masks: bool = False) -> SplitScan:
    """Read a split; see ``scan_coco``. File names are relative to its images' folder, to ``images/`` or to the root."""
    others = tuple(folder for folder in (source.root / "images", source.root) if folder != source.images)
    return scan_coco(source.file, source.images, name=source.name, masks=masks, others=others)


def _image_folder(root: Path, file: Path, stem: str) -> Path:
    if file.name == "_annotations.coco.json":
        return file.parent
    split = split_name(stem) or stem
    parents = (root, root / "images")
    options = [parent / name for name in (stem, split) for parent in parents]
    # Annotations of "train" with images in "train2017".
    options += [folder for parent in parents for folder in sorted(parent.glob("*")) if split_name(folder.name) == split]
    return next(option for option in [*options, root / "images", root] if option.is_dir())
