"""Instances: pool ground-truth boxes from feature maps, and group them by image without touching the device twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import roi_align

from drkd.losses.distance import at_least_float32, full_precision


@dataclass(frozen=True)
class InstanceLayout:
    """Where each instance of a batch sits, built on the host from the counts alone, so that nothing waits for a GPU.

    Args:
        counts: Instances of each group (an image, or the whole batch), M of them.
        group: (sum N,) int64, group of each instance.
        slot: (sum N,) int64, position of each instance in the flattened (M, Nmax) grid.
        source: (M, Nmax) int64, instance in each cell of the grid; 0 where there is none.
        mask: (M, Nmax) bool, True where there is one.
    """

    counts: tuple[int, ...]
    group: Tensor
    slot: Tensor
    source: Tensor
    mask: Tensor

    @classmethod
    def build(cls, counts: Sequence[int], device: torch.device | str) -> InstanceLayout:
        """Lay out ``counts`` instances and copy the indices to the device without blocking."""
        widest = max(counts, default=0)
        group: list[int] = []
        slot: list[int] = []
        source = torch.zeros(len(counts), widest, dtype=torch.int64)
        mask = torch.zeros(len(counts), widest, dtype=torch.bool)
        for row, count in enumerate(counts):
            source[row, :count] = torch.arange(len(group), len(group) + count)
            mask[row, :count] = True
            group.extend([row] * count)
            slot.extend(range(row * widest, row * widest + count))

        def move(tensor: Tensor) -> Tensor:
            if torch.device(device).type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        indices = move(torch.tensor(group, dtype=torch.int64)), move(torch.tensor(slot, dtype=torch.int64))
        return cls(tuple(counts), *indices, move(source), move(mask))

    @property
    def total(self) -> int:
        """Number of instances."""
        return sum(self.counts)

    def pad(self, flat: Tensor) -> Tensor:
        """(sum N, D) to (M, Nmax, D), zeros where there is no instance."""
        padded = flat.index_select(0, self.source.flatten()).view(*self.mask.shape, flat.shape[1])
        return padded.masked_fill(~self.mask.unsqueeze(2), 0.0)

    def unpad(self, padded: Tensor) -> Tensor:
        """(M, Nmax, D) to (sum N, D)."""
        return padded.flatten(0, 1).index_select(0, self.slot)


def count_boxes(boxes: Sequence[Tensor]) -> list[int]:
    """Number of boxes of each image, from the shapes.

    Raises:
        ValueError: If a tensor is not (N, 4).
    """
    for index, tensor in enumerate(boxes):
        if tensor.ndim != 2 or tensor.shape[1] != 4:
            raise ValueError(f"Expected boxes (N, 4) for each image, got {tuple(tensor.shape)} for image {index}")
    return [int(tensor.shape[0]) for tensor in boxes]


def pool_instances(
    feature: Tensor,
    boxes: Sequence[Tensor],
    *,
    image_size: tuple[int, int],
    output_size: int = 3,
    aligned: bool = True,
    sampling_ratio: int = 2,
    layout: InstanceLayout | None = None,
) -> Tensor:
    """Pool every box from its own image's map: one RoIAlign for the whole batch.

    Deviations from the released code: each image is pooled from its own map (there every box reads image 0), vertical
    and horizontal strides are told apart, and an image or a batch without boxes is no error.

    Args:
        feature: (B, C, h, w).
        boxes: One (N, 4) tensor an image, xyxy px of the image tensor; may leave the image or have no area.
        image_size: Height and width of the image tensor, px.
        output_size: r, cells a side.
        aligned: Shift by half a cell, the exact alignment; False as released (and a box is then at least one cell).
        sampling_ratio: Samples a cell and axis; -1 adapts to the box, as released, at a cost that follows its size.
        layout: Of the images, where the caller has it already.

    Returns:
        (sum N, C, r, r), at least float32, image by image. Without boxes (0, C, r, r), still part of the graph.

    Raises:
        ValueError: If shapes do not fit.
    """
    if feature.ndim != 4 or len(boxes) != feature.shape[0]:
        raise ValueError(
            f"Expected a map (B, C, h, w) and B tensors of boxes, got {tuple(feature.shape)} and {len(boxes)}"
        )
    counts = count_boxes(boxes)
    if layout is None:
        layout = InstanceLayout.build(counts, feature.device)
    with full_precision(feature):
        feature = at_least_float32(feature)
        corners = torch.cat(list(boxes)).to(device=feature.device, dtype=feature.dtype, non_blocking=True)
        scale_x, scale_y = feature.shape[3] / image_size[1], feature.shape[2] / image_size[0]
        regions = torch.stack(
            (
                layout.group.to(feature.dtype),
                corners[:, 0] * scale_x,
                corners[:, 1] * scale_y,
                corners[:, 2] * scale_x,
                corners[:, 3] * scale_y,
            ),
            dim=1,
        )
        pooled: Tensor = roi_align(
            feature, regions, output_size, spatial_scale=1.0, sampling_ratio=sampling_ratio, aligned=aligned
        )
    return pooled
