"""Many images' annotations in a few tensors, which processes share, not in a few objects an image, which they copy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
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
        self._ends = _running_total([len(piece) for piece in pieces])

    def __getitem__(self, index: int) -> bytes:
        start, end = self._ends[index : index + 2].tolist()
        return self._content[start:end].numpy().tobytes()


class PackedRecords(Sequence[ImageRecord]):
    """A sequence of records that holds no object an image.

    A training set of 118,000 images would be a million small objects. Every worker that decodes images counts
    references on them, and so ends up with a copy of its own of memory that a fork had shared; tensors' contents are
    shared to the end. A record is made anew where it is asked for; its tensors are views, to be read only.

    Args:
        records: The records, ids within 64 bits.
    """

    def __init__(self, records: Iterable[ImageRecord]) -> None:
        held = list(records)
        self._ids = torch.tensor([record.image_id for record in held], dtype=torch.int64)
        self._paths = _Pieces([os.fsencode(record.path) for record in held])
        self._sizes = torch.tensor([record.size for record in held], dtype=torch.int64).reshape(-1, 2)
        flags = [(record.turned, record.labelled, record.masks is not None) for record in held]
        self._flags = torch.tensor(flags, dtype=torch.bool).reshape(-1, 3)
        self._ends = _running_total([len(record.labels) for record in held])
        self._boxes = torch.cat([torch.zeros(0, 4), *(record.boxes for record in held)])
        self._labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(record.labels for record in held)])
        self._crowd = torch.cat([torch.zeros(0, dtype=torch.bool), *(record.crowd for record in held)])
        self._areas = torch.cat([torch.zeros(0), *(record.areas for record in held)])
        masks = [mask for record in held for mask in record.masks or ()]
        self._mask_ends = _running_total([len(record.masks or ()) for record in held])
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
        rows = zip(self._ids[start:end].tolist(), sizes, *columns, self._flags[start:end].tolist(), strict=True)
        for place, (identity, size, boxes, labels, crowd, areas, flags) in enumerate(rows, start):
            turned, labelled, masked = flags
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


def _running_total(counts: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int64)
