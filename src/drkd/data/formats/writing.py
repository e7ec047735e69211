"""What the writers of all formats take, and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drkd.contracts import ImageRecord
from drkd.data.split import DatasetSplit


@dataclass(frozen=True)
class WrittenSplit:
    """A split that is to be written.

    Args:
        split: The split.
        names: Of each image, its path in the target's folder of images, with forward slashes.
    """

    split: DatasetSplit
    names: tuple[str, ...]


@dataclass(frozen=True)
class Writer:
    """How a format is written.

    Args:
        folder: By split name, the target's folder of its images, relative to its root.
        write: Writes everything but the images below the root.
        losses: What of a split the format cannot hold, a line each.
        count: How many of an image's boxes the format holds; all by default.
        flat: All images of all splits lie in one folder, without sub-folders.
        stems: Images are told apart by their names without the ending.
        shown: Boxes are in px of the images as viewers show them, turned by EXIF.
        listed: Images are those that a folder holds: files that end as images do, and are not hidden.
    """

    folder: Callable[[str], str]
    write: Callable[[Path, Sequence[WrittenSplit]], None]
    losses: Callable[[DatasetSplit], list[str]]
    count: Callable[[ImageRecord], int] = lambda record: len(record.labels)
    flat: bool = False
    stems: bool = False
    shown: bool = False
    listed: bool = False


def losses_of_ids(split: DatasetSplit) -> list[str]:
    """What is lost where a format numbers images and classes by itself."""
    lost = []
    if [record.image_id for record in split.records] != list(range(1, len(split) + 1)):
        lost.append("image ids: images are numbered from 1, in their order")
    if split.category_ids and split.category_ids != tuple(range(len(split.class_names))):
        lost.append(f"category ids ({', '.join(map(str, split.category_ids[:4]))}, ...): classes are numbered from 0")
    return lost


def losses_of_areas(split: DatasetSplit) -> list[str]:
    """What is lost where a format has no areas."""
    count = 0
    for record in split.records:
        own = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(dim=1)
        count += int(((record.areas - own).abs() > 1e-3 * own.clamp_min(1.0)).sum())
    return (
        [f"areas of {count} boxes that are those of masks: the box's own stands in (AP_S, AP_M, AP_L)"] if count else []
    )
