"""Weights of a map's positions that give every object the same say, however small it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.losses.box_masks import in_portions, padded_boxes
from drkd.losses.distance import at_least_float32, full_precision


@torch.no_grad()
def object_weights(boxes: Sequence[Tensor], feature: Tensor, *, image_size: tuple[int, int], share: float) -> Tensor:
    r"""Weigh positions so that a share of a mean over maps belongs to the objects and the rest to all positions.

    .. math:: w = (1 - b) + b\,\frac{B H W}{N} \sum_n \frac{c_n}{\sum c_n}

    b the share, N the number of boxes, c_n the part of each position that box n covers: a box of four positions counts
    as much as one of four hundred. The mean of w over the batch is 1. A box that covers nothing of the map counts for
    nothing; without boxes w is 1.

    Args:
        boxes: One (N, 4) tensor an image, xyxy px; may leave the image or have no area.
        feature: (B, C, H, W), for its size and device.
        image_size: Height and width of the image tensor, px.
        share: b, in [0, 1].

    Returns:
        (B, 1, H, W), at least float32.
    """
    count, _, height, width = feature.shape
    with full_precision(feature):
        like = at_least_float32(feature[:, :1, :1, :1])
        corners, present = padded_boxes(boxes, like=like)
        rows = _coverage(corners[..., 1], corners[..., 3], cells=height, length=image_size[0])
        columns = _coverage(corners[..., 0], corners[..., 2], cells=width, length=image_size[1])
        area = rows.sum(2) * columns.sum(2)
        seen = present & (area > 0)
        total = seen.sum()
        each = torch.where(seen, 1 / area.clamp_min(1e-6), 0.0)
        painted = like.new_zeros(count, height, width)
        for some_rows, some_columns, some in in_portions(rows, columns, each):
            painted = painted + torch.einsum("bn,bnh,bnw->bhw", some, some_rows, some_columns)
        painted = painted * (count * height * width) / total.clamp_min(1)
        # Without an object the objects' share goes to all positions.
        objects = torch.where(total > 0, painted, 1.0)
        return ((1 - share) + share * objects).unsqueeze(1)


def _coverage(first: Tensor, last: Tensor, *, cells: int, length: int) -> Tensor:
    """(B, N, cells): the part of each cell between two coordinates (B, N), px."""
    edges = torch.arange(cells + 1, device=first.device, dtype=first.dtype)
    scale = cells / length
    low = torch.maximum(first.unsqueeze(2) * scale, edges[:-1])
    high = torch.minimum(last.unsqueeze(2) * scale, edges[1:])
    return (high - low).clamp_min(0)
