"""Finds the splits of a data set folder and serves their images with boxes, ready for a detector."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from drkd.contracts import BoxTargets, DrkdError, ImageRecord, Size
from drkd.data.formats.reading import FormatChoice, find_sources, read_source
from drkd.data.image import decode_image
from drkd.data.masks import unpack_masks
from drkd.data.problem import LeaveOut
from drkd.data.records import PackedRecords
from drkd.data.split import DatasetSplit

__all__ = [
    "DatasetSplit",
    "DetectionDataset",
    "Sample",
    "find_splits",
    "keep_classes",
    "load_split",
    "map_classes",
]

Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[Tensor, dict[str, Any]]]
"""Maps an image, uint8 (3, H, W), and its target to a float image in [0, 1] and the moved target."""


def find_splits(root: Path, *, format: FormatChoice = "auto") -> dict[str, tuple[Path, Path]]:
    """Find the splits of a data set folder in COCO, YOLO or VOC format.

    Args:
        root: The data set's folder.
        format: Its format; by default the one that its content shows.

    Returns:
        By split, the file that describes it and the folder of its images; without those that are named but not there.

    Raises:
        DrkdError: If there is no such folder, no split in it, files of several formats, or two files for one split.
    """
    found = find_sources(root, format=format)
    return {name: (source.file, source.images) for name, source in found.items() if not source.absent}


def load_split(
    root: Path,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    format: FormatChoice = "auto",
    masks: bool = False,
    leave_out: LeaveOut | None = None,
) -> DatasetSplit:
    """Load one split of a data set folder.

    Args:
        root: The data set's folder.
        split: "train", "tune", "val" or "test" (VOC also has "trainval").
        class_names: Classes whose order the labels must follow (a checkpoint's, another split's); the data's classes
            are mapped to them by name. The data's own order by default.
        classes: Use these classes only, leaving out the boxes of others; all by default.
        format: The data's format; by default the one that is found.
        masks: Keep the instances' masks, for detectors that train them; COCO has them.
        leave_out: Called for each image whose header cannot be read and whose size the annotations do not give; it is
            then left out. By default it is an error.

    Raises:
        DrkdError: If the split is not there, cannot be used, has a class that ``class_names`` lacks, or lacks one of
            ``classes`` that ``class_names`` lacks too.
    """
    sources = find_sources(root, format=format)
    if split not in sources:
        raise DrkdError(f"{root}: there is no split '{split}'; this folder has {', '.join(sorted(sources))}.")
    source = sources[split]
    loaded = read_source(source, masks=masks, leave_out=leave_out)
    if classes is not None:
        loaded = keep_classes(loaded, classes, source=source.file, known=class_names or ())
    return loaded if class_names is None else map_classes(loaded, class_names, source=source.file)


def keep_classes(
    split: DatasetSplit, classes: Sequence[str], *, source: Path, known: Sequence[str] = ()
) -> DatasetSplit:
    """Leave out the boxes of all but some classes; images that have none of them stay, without boxes.

    Args:
        split: The split.
        classes: The classes to keep; they become labels 0, 1, ... in this order.
        source: The split's file, for the message.
        known: Classes that another split has; this one may lack them.

    Raises:
        DrkdError: If a class is not there, or is given twice.
    """
    names = tuple(classes)
    if unknown := [name for name in names if name not in split.class_names and name not in known]:
        raise DrkdError(
            f"{source}: data.classes: there is no class {_listing(unknown)}; the data has "
            f"{_listing(split.class_names)}."
        )
    if not names or len(set(names)) != len(names):
        raise DrkdError(f"data.classes: expected at least one class and each once, got {list(names)}.")
    table = torch.full((len(split.class_names),), -1, dtype=torch.int64)
    for label, name in enumerate(names):
        if name in split.class_names:
            table[split.class_names.index(name)] = label
    records = []
    for record in split.records:
        labels = table[record.labels]
        kept = labels >= 0
        records.append(
            replace(
                record,
                boxes=record.boxes[kept],
                labels=labels[kept],
                crowd=record.crowd[kept],
                areas=record.areas[kept],
                masks=None
                if record.masks is None
                else tuple(mask for mask, keep in zip(record.masks, kept.tolist(), strict=True) if keep),
            )
        )
    ids = dict(zip(split.class_names, split.category_ids, strict=False))
    return DatasetSplit(split.name, tuple(records), names, tuple(ids.get(name, -1) for name in names) if ids else ())


def map_classes(split: DatasetSplit, class_names: Sequence[str], *, source: Path) -> DatasetSplit:
    """Renumber the labels of a split to follow other class names.

    Args:
        split: The split.
        class_names: The wanted classes; may hold more than the split's.
        source: The split's file, for the message.

    Raises:
        DrkdError: If a class of the split is not among the wanted ones, or a wanted one is listed twice.
    """
    names = tuple(class_names)
    if names == split.class_names:
        return split
    unknown = [name for name in split.class_names if name not in names]
    if unknown:
        more = ", or keep those classes only (--classes, data.classes)" if {*names} <= {*split.class_names} else ""
        raise DrkdError(
            f"{source}: the classes differ: its {_listing(unknown)} not among the expected {len(names)} classes "
            f"({_listing(names)}). Use the data set that the model was made for, or rename the categories{more}."
        )
    if len(set(names)) != len(names):
        names_twice = sorted({name for name in split.class_names if names.count(name) > 1})
        if names_twice:
            raise DrkdError(f"{source}: the class names {_listing(names_twice)} are expected more than once.")
    new_labels = torch.tensor([names.index(name) for name in split.class_names], dtype=torch.int64)
    ids = dict(zip(split.class_names, split.category_ids, strict=False))
    records = tuple(replace(record, labels=new_labels[record.labels]) for record in split.records)
    return replace(
        split,
        records=records,
        class_names=names,
        category_ids=tuple(ids.get(name, -1) for name in names) if ids else (),
    )


def _listing(names: Sequence[str], *, shown: int = 6) -> str:
    text = ", ".join(f"'{name}'" for name in names[:shown])
    return text + (f" and {len(names) - shown} more" if len(names) > shown else "")


@dataclass(frozen=True)
class Sample:
    """One image ready to be put in a batch.

    Args:
        image: (3, H, W) float32, RGB in [0, 1].
        targets: Boxes in px of ``image``.
        original_size: Height and width of the stored image, px.
        image_id: The record's id.
        labelled: Whether the boxes are known.
    """

    image: Tensor
    targets: BoxTargets
    original_size: Size
    image_id: int
    labelled: bool = True


class DetectionDataset(Dataset[Sample]):
    """The images of a split, decoded and transformed.

    An index is a position or an ``(epoch, position)`` pair. What is random in the transforms is a function of
    (seed, epoch, image id) and of nothing else: neither of the worker nor of what ran before.

    Args:
        split: The annotated images.
        transforms: Maps image and target; see ``drkd.data.transforms``.
        seed: Of the augmentation.
        keep_crowds: Keep crowds in the targets, flagged to be ignored, rather than leaving them out.
        minimum_side: Boxes with a side shorter than this after the transforms are left out, px.
        substitutes: Where an image cannot be read, take the next one in the split that is labelled, or not, as it is,
            up to so many times, and note it in ``unreadable``; 0 = raise. Which image stands in depends on nothing but
            the files.

    Attributes:
        unreadable: (images,) uint8 in shared memory, so that workers write into it: 1 where an image was replaced.
    """

    def __init__(
        self,
        split: DatasetSplit,
        transforms: Transform,
        *,
        seed: int = 0,
        keep_crowds: bool = False,
        minimum_side: float = 0.0,
        substitutes: int = 0,
    ) -> None:
        self.split = split
        self._transforms = transforms
        self._seed = seed
        self._keep_crowds = keep_crowds
        self._minimum_side = minimum_side
        self._substitutes = substitutes
        self.unreadable = torch.zeros(len(split.records), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.split.records)

    def __getitem__(self, index: int | tuple[int, int]) -> Sample:
        epoch, position = (0, index) if isinstance(index, int) else index
        record, pixels = self._decode(position)
        image = tv_tensors.Image(pixels)
        chosen = torch.ones_like(record.crowd) if self._keep_crowds else ~record.crowd
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                record.boxes[chosen], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=record.size
            ),
            "labels": record.labels[chosen],
            "ignore": record.crowd[chosen],
        }
        if record.masks is not None:
            kept = [mask for mask, keep in zip(record.masks, chosen.tolist(), strict=True) if keep]
            target["masks"] = tv_tensors.Mask(unpack_masks(kept, record.size))
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(_mix(self._seed, epoch, record.image_id))
            moved, target = self._transforms(image, target)
        targets = self._targets(target, moved)
        return Sample(torch.Tensor(moved), targets, record.size, record.image_id, labelled=record.labelled)

    def _decode(self, position: int) -> tuple[ImageRecord, Tensor]:
        """The image at a position, or the one that stands in for it."""
        try:
            return self._read(position)
        except DrkdError as error:
            if not self._substitutes:
                raise
            failed = error
        places = [*islice(self._alike(position), self._substitutes + 1)]
        for place, following in pairwise(places):
            if not self.unreadable[place]:
                self.unreadable[place] = 1
                print(f"drkd: left out, the next image stands in: {failed}", file=sys.stderr, flush=True)
            try:
                return self._read(following)
            except DrkdError as error:
                failed = error
        raise DrkdError(
            f"{len(places)} images in a row cannot be read, which is no chance any more; the last: {failed}"
        ) from failed

    def _read(self, position: int) -> tuple[ImageRecord, Tensor]:
        record = self.split.records[position]
        return record, decode_image(record.path, record.size, turned=record.turned)

    def _alike(self, position: int) -> Iterator[int]:
        """A position and those that follow, around, of images that are labelled, or not, as it is."""
        known = cast(PackedRecords, self.split.records).labelled
        yield position
        for place in chain(range(position + 1, len(known)), range(position)):
            if known[place] == known[position]:
                yield place

    def _targets(self, target: dict[str, Any], image: Tensor) -> BoxTargets:
        height, width = image.shape[-2:]
        boxes = target["boxes"].as_subclass(Tensor)
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) if len(boxes) else boxes.new_zeros(0)
        kept = (sides > 0) & (sides >= self._minimum_side)
        masks = target["masks"].as_subclass(Tensor)[kept] if "masks" in target else None
        return BoxTargets(boxes[kept], target["labels"][kept], target["ignore"][kept], masks)


def _mix(seed: int, epoch: int, image_id: int) -> int:
    """One well-spread 63-bit seed of three integers (splitmix64's finaliser after each)."""
    state = 0
    for value in (seed, epoch, image_id):
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
