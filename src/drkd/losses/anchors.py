"""Anchors of a pyramid level, for the methods that look at a map through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AnchorStyle = Literal["centred", "inclusive"]
"""Which grid the anchors form; see `level_anchors`."""


def level_anchors(
    size: tuple[int, int],
    stride: tuple[float, float],
    *,
    scales: Sequence[float],
    ratios: Sequence[float],
    style: AnchorStyle,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Vertical and horizontal extents of the anchors of a map, apart: an anchor is a row, a column and a shape.

    ``centred``: the centre is the cell's top left corner, (x, y) times the stride, and the sides are
    stride * scale / sqrt(ratio) and stride * scale * sqrt(ratio), as in MMDetection and torchvision. ``inclusive``: the
    grid of py-faster-rcnn, sides rounded before they are scaled, centres in the middle of the stride's pixels, and both
    corners part of the box.

    Args:
        size: H and W, cells.
        stride: Pixels of a cell, vertically and horizontally; a shape is measured by their geometric mean.
        scales: Sides of the anchors, strides.
        ratios: Heights over widths.
        style: See above.
        like: For device and dtype.

    Returns:
        (A, H, 2) top and bottom, and (A, W, 2) left and right, px; A runs over ratios, then scales.
    """
    base = math.sqrt(stride[0] * stride[1])
    shapes: list[tuple[float, float]] = []
    for ratio in ratios:
        height, width = base * math.sqrt(ratio), base / math.sqrt(ratio)
        if style == "inclusive":
            width = round(width)
            height = round(width * ratio)
        shapes.extend((height * scale, width * scale) for scale in scales)
    shift, shrink = ((base - 1) / 2, 1.0) if style == "inclusive" else (0.0, 0.0)
    extents = []
    for axis in (0, 1):
        centres = torch.arange(size[axis], device=like.device, dtype=like.dtype) * stride[axis] + shift
        halves = [(shape[axis] - shrink) / 2 for shape in shapes]
        extents.append(torch.stack([torch.stack((centres - half, centres + half), dim=1) for half in halves]))
    return extents[0], extents[1]
