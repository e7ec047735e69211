"""Tests of the packed records."""

from __future__ import annotations

import gc
import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

from drkd.contracts import ImageRecord, PackedMask
from drkd.data.records import PackedRecords
from drkd.data.split import DatasetSplit


def _record(number: int, boxes: int, *, masks: bool = False) -> ImageRecord:
    generator = torch.Generator().manual_seed(number)
    return ImageRecord(
        number,
        Path(os.fsdecode(f"images/{number} ".encode() + b"\xff.png")),
        (10 + number % 7, 20),
        torch.rand(boxes, 4, generator=generator),
        torch.randint(0, 9, (boxes,), generator=generator),
        torch.rand(boxes, generator=generator) < 0.5,
        torch.rand(boxes, generator=generator),
        masks=tuple(PackedMask((10, 20 + n), bytes([n] * n)) for n in range(boxes)) if masks else None,
        turned=number % 2 == 0,
        labelled=number % 3 > 0,
    )


def _assert_same(found: ImageRecord, expected: ImageRecord) -> None:
    for field in ("image_id", "path", "size", "masks", "turned", "labelled"):
        assert getattr(found, field) == getattr(expected, field), field
    assert isinstance(found.path, Path)
    for field in ("boxes", "labels", "crowd", "areas"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0)


@pytest.mark.parametrize("masks", [False, True])
def test_records_come_out_as_they_went_in(masks: bool) -> None:
    records = [_record(number, number % 4, masks=masks and number != 5) for number in range(2500)]
    packed = PackedRecords(records)
    assert len(packed) == 2500
    for found, expected in zip(packed, records, strict=True):
        _assert_same(found, expected)
    for place in (0, 3, 1024, -1):
        _assert_same(packed[place], records[place])
    part = packed[1020:1030:3]
    assert isinstance(part, PackedRecords)
    for found, expected in zip(part, records[1020:1030:3], strict=True):
        _assert_same(found, expected)
    for beyond in (2500, -2501):
        with pytest.raises(IndexError):
            packed[beyond]
    for found, expected in zip(pickle.loads(pickle.dumps(packed)), records, strict=True):
        _assert_same(found, expected)


def test_no_record_is_none() -> None:
    packed = PackedRecords([])
    assert (len(packed), list(packed), list(packed[:3])) == (0, [], [])
    with pytest.raises(IndexError):
        packed[0]


def test_a_record_whose_columns_differ_is_refused_by_its_name() -> None:
    whole, wrong = _record(1, 2), _record(2, 3)
    with pytest.raises(ValueError, match=r"images/2 .*\.png: expected as many of each, got 3 boxes, 2 labels, 3 crowd"):
        PackedRecords([whole, replace(wrong, labels=wrong.labels[:2])])
    with pytest.raises(ValueError, match="2 areas, 1 masks"):
        PackedRecords([replace(whole, masks=(PackedMask((1, 1), b"1"),))])


def test_the_column_says_what_is_labelled() -> None:
    records = [_record(number, 0) for number in range(5)]
    assert PackedRecords(iter(records)).labelled.tolist() == [record.labelled for record in records]


def _reachable(thing: object) -> int:
    """How many objects a thing holds, directly or not."""
    seen: dict[int, object] = {}
    waiting = [thing]
    while waiting:
        entry = waiting.pop()
        if id(entry) not in seen and not isinstance(entry, type | ModuleType | FunctionType):
            seen[id(entry)] = entry
            waiting += gc.get_referents(entry)
    return len(seen)


def test_a_split_holds_no_object_an_image() -> None:
    small, large = (
        DatasetSplit("train", tuple(_record(number, 3, masks=True) for number in range(count)), ("cat",))
        for count in (10, 1000)
    )
    assert _reachable(large) == _reachable(small)
    # Three boxes of 29 bytes with masks, and a name.
    assert len(pickle.dumps(large.records)) < 400 * 1000
