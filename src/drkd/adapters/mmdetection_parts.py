"""What MMDetection does otherwise than torchvision: anchors, coarse levels, pooling, deformable convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, deform_conv2d, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class FixedStrideAnchors(AnchorGenerator):
    """Anchors of exact sides at exact strides, centred on the top left corner of their cell (centre offset 0).

    torchvision rounds the sides to whole pixels and takes the padded image over the map's size for the stride, which
    for 800 px is 61 where the level's stride is 64. The order, by ratio and then by size, is the same in both.

    Args:
        strides: Of each level, px.
        scales: Side of a square anchor in strides.
        ratios: Height over width.
    """

    def __init__(self, strides: Sequence[int], *, scales: Sequence[float], ratios: Sequence[float]) -> None:
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        self.strides = tuple(strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors of a cell, (A, 4) xyxy px around (0, 0), not rounded (called by torchvision)."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt().unsqueeze(1)
        widths, heights = (sides / root).flatten(), (sides * root).flatten()
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """All anchors of each image, (A, 4) xyxy px."""
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        grids = [list(entry.shape[-2:]) for entry in feature_maps]
        strides = [[torch.full((), stride, device=first.device) for _ in range(2)] for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors for _ in image_list.image_sizes]


class ConvolvedLevels(ExtraFPNBlock):
    """Coarser levels by convolutions of stride 2 (MMDetection's ``add_extra_convs``).

    torchvision's own block puts a ReLU between its two; MMDetection's RetinaNet does not.

    Args:
        inputs: Channels that each convolution takes.
        channels: Channels that each gives.
        on_input: The first reads the backbone's coarsest map; False is the pyramid's.
        activation: ReLU before every convolution but the first (``relu_before_extra_convs``).
    """

    def __init__(self, inputs: Sequence[int], channels: int, *, on_input: bool, activation: bool) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(width, channels, 3, stride=2, padding=1) for width in inputs)
        self.on_input = on_input
        self.activation = activation

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append the levels (called by torchvision's pyramid)."""
        current = x[-1] if self.on_input else results[-1]
        for index, convolution in enumerate(self.convolutions):
            current = convolution(torch.relu(current) if self.activation and index else current)
            results.append(current)
            names.append(f"extra{index}")
        return results, names


class AlignedRoIPool(MultiScaleRoIAlign):
    """Pools each box from the level of its size with RoIAlign's exact alignment (``aligned=True``).

    torchvision's detectors use the unshifted kind. Which level a box belongs to is the same in both: 56 px for the
    finest is 224 px for the third.
    """

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(sum R, C, r, r) for (R, 4) boxes of each image, xyxy px of the padded image."""
        del image_shapes  # drkd sets the scales from the padded size
        if self.scales is None or self.map_levels is None:
            raise ValueError("expected a call through drkd's TorchvisionDetector, which sets scales and levels")
        maps = [x[name] for name in x if name in self.featmap_names]
        image = torch.cat([boxes[0].new_full((len(entry), 1), index) for index, entry in enumerate(boxes)])
        regions = torch.cat([image, torch.cat(boxes)], dim=1)
        levels = self.map_levels(boxes)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for index, (feature, scale) in enumerate(zip(maps, self.scales, strict=True)):
            places = torch.where(levels == index)[0]
            own = roi_align(feature, regions[places], self.output_size, scale, self.sampling_ratio, aligned=True)
            pooled = pooled.index_copy(0, places, own.to(pooled.dtype))
        return pooled


class DeformableConvolution(nn.Module):
    """A 3x3 convolution that learns where to look (Dai et al., arXiv:1703.06211; with a mask: arXiv:1811.11168).

    Args:
        plain: The convolution that it stands for.
        modulated: Whether each sample also has a weight (DCNv2).
    """

    def __init__(self, plain: nn.Conv2d, *, modulated: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(plain.weight))
        # Of each of the nine samples, its shift down and right, and its weight.
        self.conv_offset = nn.Conv2d(plain.in_channels, 27 if modulated else 18, 3, stride=plain.stride[0], padding=1)
        self.stride = plain.stride[0]
        self.modulated = modulated

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w')."""
        where = self.conv_offset(feature)
        mask = where[:, 18:].sigmoid() if self.modulated else None
        found: Tensor = deform_conv2d(
            feature, where[:, :18], self.weight, stride=self.stride, padding=(1, 1), mask=mask
        )
        return found


def put_stride_first(network: Any) -> None:
    """Give the stride of a stage to the first 1x1 convolution of its first block, as Caffe's ResNets have it."""
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
