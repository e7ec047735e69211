"""Many images' annotations in a few tensors, which processes share, not in a few objects an image, which they copy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from drkd.contracts import ImageRecord, PackedMask

# Images that are unpacked at once by an iteration: their views are cheap together and few enough to be held.
_CHUNK = 1024


class _Pieces:
    """Byte strings, end to end."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._content = torch.frombuffer(bytearray(b"".join(pieces)) or bytearray(1), dtype=torch.uint8)
        self._ends = _running_total(torch.tensor([len(piece) for piece in pieces], dtype=torch.int64))

    def __getitem__(self, index: int) -> bytes:
        start, end = self._ends[index : index + 2].tolist()
        return self._content[start:end].numpy().tobytes()


class PackedRecords(Sequence[ImageRecord]):
    """A sequence of records that holds no object an image.

    A training set of 118,000 images would be a million small objects. Every worker that decodes images counts
    references on them, and so ends up with a copy of its own of memory that a fork had shared; tensors' contents are
    shared to the end. A record is made anew where it is asked for, which takes tens of microseconds; its tensors are
    views, to be read only. Pickling one record writes all: send a slice.

    Args:
        records: The records, ids within 64 bits; may be a generator, which then is never held as a whole.

    Attributes:
        labelled: (images,) bool, of each record whether its boxes are known.

    Raises:
        ValueError: If a record has not as many boxes, labels, crowd flags and areas (and masks, where it has any).
    """

    def __init__(self, records: Iterable[ImageRecord]) -> None:
        rows: list[tuple[int, int, int, int, int, bool, bool, bool]] = []
        names: list[bytes] = []
        # Each starts with none, for the types of a split without images.
        boxes, areas = [torch.zeros(0, 4)], [torch.zeros(0)]
        labels, crowd = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.bool)]
        masks: list[PackedMask] = []
        waiting = iter(records)
        while held := list(islice(waiting, _CHUNK)):
            for record in held:
                _check(record)
                own = record.masks or ()
                counts = (len(record.labels), len(own))
                flags = (record.turned, record.masks is not None, record.labelled)
                rows.append((record.image_id, *record.size, *counts, *flags))
                names.append(os.fsencode(record.path))
                masks.extend(own)
            boxes.append(torch.cat([record.boxes for record in held]))
            labels.append(torch.cat([record.labels for record in held]))
            crowd.append(torch.cat([record.crowd for record in held]))
            areas.append(torch.cat([record.areas for record in held]))
        columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 8)
        self._ids, self._sizes = columns[:, 0].clone(), columns[:, 1:3].clone()
        self._ends, self._mask_ends = _running_total(columns[:, 3]), _running_total(columns[:, 4])
        self._flags, self.labelled = columns[:, 5:7].bool(), columns[:, 7].bool()
        self._paths = _Pieces(names)
        self._boxes, self._labels = torch.cat(boxes), torch.cat(labels)
        self._crowd, self._areas = torch.cat(crowd), torch.cat(areas)
        self._mask_sizes = torch.tensor([mask.size for mask in masks], dtype=torch.int64).reshape(-1, 2)
        self._mask_counts = _Pieces([mask.counts for mask in masks])

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> PackedRecords: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | PackedRecords:
        if isinstance(index, slice):
            return PackedRecords(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]  # counts from the end, or raises
        return next(self._unpack(place, place + 1))

    def __iter__(self) -> Iterator[ImageRecord]:
        for start in range(0, len(self), _CHUNK):
            yield from self._unpack(start, min(start + _CHUNK, len(self)))

    def _unpack(self, start: int, end: int) -> Iterator[ImageRecord]:
        """The records of a run of places."""
        ends = self._ends[start : end + 1].tolist()
        counts = [later - earlier for earlier, later in pairwise(ends)]
        columns = [column[ends[0] : ends[-1]].split(counts) for column in (self._boxes, self._labels)]
        columns += [column[ends[0] : ends[-1]].split(counts) for column in (self._crowd, self._areas)]
        sizes: list[tuple[int, int]] = [(height, width) for height, width in self._sizes[start:end].tolist()]
        flags, known = self._flags[start:end].tolist(), self.labelled[start:end].tolist()
        rows = zip(self._ids[start:end].tolist(), sizes, *columns, flags, known, strict=True)
        for place, (identity, size, boxes, labels, crowd, areas, (turned, masked), labelled) in enumerate(rows, start):
            yield ImageRecord(
                identity,
                Path(os.fsdecode(self._paths[place])),
                size,
                boxes,
                labels,
                crowd,
                areas,
                masks=self._masks(place) if masked else None,
                turned=turned,
                labelled=labelled,
            )

    def _masks(self, place: int) -> tuple[PackedMask, ...]:
        start, end = self._mask_ends[place : place + 2].tolist()
        sizes = self._mask_sizes[start:end].tolist()
        return tuple(
            PackedMask((height, width), self._mask_counts[start + number])
            for number, (height, width) in enumerate(sizes)
        )


def _check(record: ImageRecord) -> None:
    columns = {"boxes": record.boxes, "labels": record.labels, "crowd": record.crowd, "areas": record.areas}
    counts = {name: len(column) for name, column in columns.items()}
    if record.masks is not None:
        counts["masks"] = len(record.masks)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{record.path}: expected as many of each, got {listed}")


def _running_total(counts: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
