"""Moves boxes between the frame of an image as it is stored and as a viewer shows it, turned by its EXIF data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from drkd.contracts import DrkdError, ImageRecord, Size
from drkd.data.image import describe_other_size, read_orientation

# Turning there and back: only the quarter turns are not their own inverses.
_BACK = {6: 8, 8: 6}


def as_shown(record: ImageRecord) -> ImageRecord:
    """The record in px of the image as a viewer shows it.

    Raises:
        DrkdError: If the image's header cannot be read, or it has another size than the record, stored and turned.
    """
    if record.turned:
        return record
    stored, orientation = read_orientation(record.path)
    if record.size not in (stored, _turn_size(stored, orientation)):
        raise DrkdError(f"{record.path}: {describe_other_size(stored, record.size, turned=False)}")
    if orientation == 1 or record.size != stored:
        return replace(record, turned=True)
    boxes = turn_boxes(record.boxes, stored, orientation)
    return replace(record, boxes=boxes, size=_turn_size(stored, orientation), turned=True)


def as_stored(record: ImageRecord) -> ImageRecord:
    """The record in px of the stored image.

    Raises:
        DrkdError: If the image's header cannot be read.
    """
    if not record.turned:
        return record
    stored, orientation = read_orientation(record.path)
    boxes = turn_boxes(record.boxes, record.size, _BACK.get(orientation, orientation))
    return replace(record, boxes=boxes, size=stored, turned=False)


def turn_boxes(boxes: Tensor, size: Size, orientation: int) -> Tensor:
    """Boxes after the image was turned as an EXIF orientation asks for.

    Args:
        boxes: (N, 4), xyxy px of the image before.
        size: Height and width before, px.
        orientation: 1 to 8; any other number counts as 1, as viewers have it.
    """
    height, width = size
    left, top, right, bottom = boxes.unbind(dim=1)
    if orientation in (2, 3, 7, 8):
        left, right = width - right, width - left
    if orientation in (3, 4, 6, 7):
        top, bottom = height - bottom, height - top
    if orientation >= 5:
        left, top, right, bottom = top, left, bottom, right
    return torch.stack([left, top, right, bottom], dim=1)


def _turn_size(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation >= 5 else size
