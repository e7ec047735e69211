"""DeFeat's feature distillation: foreground and background cells of a pyramid are compared apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.losses.box_masks import are_outside
from drkd.losses.distance import at_least_float32, full_precision
from drkd.losses.instances import InstanceLayout, count_boxes


def decoupled_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r"""Foreground and background of one level (DeFeat, Guo et al., CVPR 2021, arXiv:2103.14475, equation 3).

    .. math:: \frac{\sum M (s - t)^2}{\max(1, 2 C \sum M)}, \qquad
              \frac{\sum (1 - M) (s - t)^2}{\max(1, 2 C \sum (1 - M))}

    The sums run over the batch, the channels and the cells.

    Args:
        student: (B, C, h, w), adapted.
        teacher: Same shape; a constant.
        mask: (B, h, w), 1 in the foreground, else 0; see `foreground_mask`.

    Returns:
        Two 0-d tensors, at least float32; a part without a cell is exactly 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.ndim != 4 or student.shape != teacher.shape or mask.shape != (student.shape[0], *student.shape[2:]):
        raise ValueError(
            "Expected maps (B, C, h, w) of one shape and a mask (B, h, w), "
            f"got {tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(mask.shape)}"
        )
    with full_precision(student):
        error = (at_least_float32(student) - at_least_float32(teacher.detach())).square().sum(dim=1)
        inside = mask.detach().to(error.dtype)
        foreground, background = (
            torch.sum(part * error) / (2 * student.shape[1] * part.sum()).clamp_min(1.0)
            for part in (inside, 1.0 - inside)
        )
    return foreground, background


def choose_levels(boxes: Tensor, strides: Sequence[float], *, cells: float = 14.0) -> Tensor:
    r"""The one level that a box belongs to, by its size (arXiv:1612.03144, equation 1, with other constants).

    :math:`k = \lfloor \log_2(\sqrt{(w + 1)(h + 1)} / (14 z_0) + 10^{-6}) \rfloor` octaves above the finest stride
    :math:`z_0`, within the pyramid. The authors have the level's number for k, at strides 4, 8, ..., 64; here it is
    the level whose stride is nearest to :math:`2^k z_0`, which is the same for them, and serves for any strides.

    Args:
        boxes: (N, 4), xyxy px.
        strides: Of each level, px, ascending.
        cells: Side of a box in cells of its level, at most twice that.

    Returns:
        (N,) int64, index of the level.
    """
    first = math.log2(strides[0])
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0.0) + 1.0
    size = sides.prod(dim=1).sqrt() / (cells * strides[0])
    octave = torch.log2(size + 1e-6).floor()
    return torch.stack([(octave - (math.log2(stride) - first)).abs() for stride in strides]).argmin(dim=0)


def foreground_mask(
    boxes: Sequence[Tensor],
    size: tuple[int, int],
    *,
    image_size: tuple[int, int],
    counted: Tensor | None = None,
) -> Tensor:
    """Cells of a level that lie in a box of their image; nothing waits for the device.

    As in the authors' code, the corners are divided by the stride and cut to whole cells, and a box that is then empty
    counts as its first cell. Deviations: such a box on the image's right or bottom border is moved in (there an error),
    and a box outside the image counts nowhere (there in a cell of the border).

    Args:
        boxes: Of each image, (N_b, 4), xyxy px of the image tensor.
        size: Height and width of the level, cells.
        image_size: Height and width of the image tensor, px.
        counted: (sum N,) bool, the boxes that count, image by image; None is all.

    Returns:
        (B, h, w) bool.
    """
    counts = count_boxes(boxes)
    device = boxes[0].device if boxes else torch.device("cpu")
    height, width = size
    corners = torch.cat(list(boxes)) if boxes else torch.zeros(0, 4)
    left, right = (_cells(corners[:, axis], width / image_size[1], width) for axis in (0, 2))
    upper, lower = (_cells(corners[:, axis], height / image_size[0], height) for axis in (1, 3))
    point = (left >= right) | (upper >= lower)
    left, upper = (
        torch.where(point, first.clamp_max(end - 1), first) for first, end in ((left, width), (upper, height))
    )
    right, lower = torch.where(point, left + 1, right), torch.where(point, upper + 1, lower)
    # Count the boxes over a cell by summing, along both axes, marks at the corners of each.
    image = InstanceLayout.build(counts, device).group.to(torch.int64) * ((height + 1) * (width + 1))
    inside = ~are_outside(corners, image_size)
    ones = (inside if counted is None else inside & counted).to(left.dtype)
    marks = torch.zeros(len(counts) * (height + 1) * (width + 1), dtype=torch.int64, device=device)
    for row, column, sign in ((upper, left, 1), (upper, right, -1), (lower, left, -1), (lower, right, 1)):
        marks.index_add_(0, image + row * (width + 1) + column, sign * ones)
    covered = marks.view(len(counts), height + 1, width + 1).cumsum(1).cumsum(2)
    return covered[:, :height, :width] > 0


def _cells(positions: Tensor, scale: float, end: int) -> Tensor:
    return (positions * scale).to(torch.int64).clamp(0, end)
