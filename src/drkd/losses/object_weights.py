"""How much each cell of a map counts when the objects of an image shall count alike, however few cells they cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.losses.distance import at_least_float32, full_precision
from drkd.losses.instances import InstanceLayout, count_boxes


def object_weights(
    boxes: Sequence[Tensor],
    *,
    map_size: tuple[int, int],
    image_size: tuple[int, int],
    share: float,
    layout: InstanceLayout | None = None,
) -> Tensor:
    r"""Weights of a batch's cells that sum to one, the same sum for every image, a part of it on the image's objects.

    :math:`w_b = \frac{1}{B} (\frac{1 - a}{HW} + \frac{a}{N_b} \sum_i c_i)`, with a the share and :math:`c_i` how much
    of box i lies in each cell, divided by its sum: a box of a quarter of a cell weighs as much as one of a hundred.
    In an image without boxes all cells count alike; a box without area, or outside the map, is none. A mean over images
    is the same however they are spread over processes.

    Args:
        boxes: One (N_b, 4) tensor an image, xyxy px of the image tensor; may leave the image.
        map_size: Height and width of the map, cells.
        image_size: Height and width of the image tensor, px.
        share: a, in [0, 1].
        layout: Of the images, where the caller has it already.

    Returns:
        (B, H, W) float32 on the boxes' device.

    Raises:
        ValueError: If a tensor is not (N, 4) or the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"Expected a share in [0, 1], got {share}")
    counts = count_boxes(boxes)
    device = boxes[0].device
    (height, width), total = map_size, sum(counts)
    cells = len(counts) * height * width
    if total == 0 or share == 0:
        return torch.full((len(counts), height, width), 1 / max(cells, 1), device=device)
    layout = layout or InstanceLayout.build(counts, device)
    with full_precision(boxes[0]):
        corners = at_least_float32(torch.cat(list(boxes)))
        x1, y1, x2, y2 = corners.unbind(1)
        rows = _covered(y1, y2, cells=height, length=image_size[0])
        columns = _covered(x1, x2, cells=width, length=image_size[1])
        on_objects = torch.einsum("bnh,bnw->bhw", layout.pad(rows), layout.pad(columns))
        seen = (rows.sum(dim=1) > 0) & (columns.sum(dim=1) > 0)
        objects = layout.pad(seen.to(rows.dtype).unsqueeze(1)).sum(dim=(1, 2)).view(-1, 1, 1)
        part = share * (objects > 0)
        return (1 - part) / cells + part / (objects.clamp_min(1) * len(counts)) * on_objects


def _covered(start: Tensor, end: Tensor, *, cells: int, length: int) -> Tensor:
    """(N, cells): the share of each interval, in px, that lies in each cell; zeros for one outside."""
    edges = torch.arange(cells, device=start.device, dtype=start.dtype) * (length / cells)
    begin, stop = start.unsqueeze(1), end.unsqueeze(1)
    covered = (torch.minimum(stop, edges + length / cells) - torch.maximum(begin, edges)).clamp_min(0)
    return covered / covered.sum(dim=1, keepdim=True).clamp_min(1e-6)
