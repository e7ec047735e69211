"""Ground-truth boxes as masks over a feature map, the whole batch at once and without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drkd.losses.instances import InstanceLayout, count_boxes

BOXES_AT_ONCE = 8
"""Boxes of an image that are painted together: bounds the memory where an image holds hundreds."""


def padded_boxes(boxes: Sequence[Tensor], *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Stack the boxes of a batch.

    Args:
        boxes: One (N, 4) tensor an image, xyxy px.
        like: A map (B, ...) whose device, dtype and number of images are wanted.

    Returns:
        (B, Nmax, 4) boxes and (B, Nmax) bool, True where there is one.

    Raises:
        ValueError: If the boxes are not one (N, 4) tensor an image.
    """
    if len(boxes) != like.shape[0]:
        raise ValueError(f"Expected boxes of {like.shape[0]} images, got {len(boxes)}")
    layout = InstanceLayout.build(count_boxes(boxes), like.device)
    corners = torch.cat(list(boxes)).to(device=like.device, dtype=like.dtype, non_blocking=True)
    return layout.pad(corners), layout.mask


def in_portions(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors (B, Nmax, ...) a few boxes at a time."""
    yield from zip(*(tensor.split(BOXES_AT_ONCE, dim=1) for tensor in tensors), strict=True)


def are_outside(corners: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Which boxes lie outside the image and have no part in it; a point or a line on its border has.

    Args:
        corners: (..., 4), xyxy px of the image tensor.
        image_size: Height and width of the image tensor, px.

    Returns:
        (...) bool.
    """
    height, width = image_size
    x1, y1, x2, y2 = corners.unbind(-1)
    before = ((x1 < 0) & (x2 <= 0)) | ((y1 < 0) & (y2 <= 0))
    return before | ((x1 >= width) & (x2 > width)) | ((y1 >= height) & (y2 > height))
