"""FGFI: the student imitates the teacher's map where anchors lie near an object."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, MapAdapter
from drkd.losses.anchors import AnchorStyle, level_anchors
from drkd.losses.box_masks import in_portions, padded_boxes
from drkd.losses.distance import full_precision


class FineGrainedLoss(nn.Module):
    r"""Fine-grained feature imitation of one level (FGFI, Wang et al., CVPR 2019, arXiv:1906.03609, section 3).

    .. math:: \frac{1}{2 N_p} \sum I (f(s) - t)^2, \qquad N_p = \sum I

    f a 3x3 convolution, I the positions at which some anchor has an IoU with some box above ``threshold`` times the
    largest IoU that this box has with any anchor of the level. N_p counts positions, not values.

    Deviations: without a position the loss is 0 (there 0 / 0); every box counts (there those after the first box of
    zeros in the padded list do not).

    The original has one map of stride 16: ``scales=(4, 8, 16, 32), anchor_style="inclusive", activation=True``. The
    default is the pyramid version in DeFeat's repository, where a box belongs to the level of its size and f has no
    ReLU (a pyramid's maps are signed); it divides by N_p times the channels too, which is part of the weight here.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        scales: Sides of the anchors, strides of the level.
        ratios: Heights over widths of the anchors.
        threshold: psi, share of the largest IoU, in [0, 1).
        anchor_style: See `level_anchors`.
        activation: A ReLU follows f.
        adapter_init: Start of f, see `make_adapter`; ``default``, the authors', draws a random basis.
        box_sizes: Boxes from the first of these sizes to below the second belong to the level; a size is
            sqrt((width + 1) (height + 1)), px.

    Shape:
        student, teacher: see `MapAdapter`.
        boxes: one (N, 4) an image, xyxy px.
        image_size: height and width of the image tensor, px.
        output: 0-d, at least float32, squared units of the features.

    Raises:
        ValueError: If an argument is out of range or the shapes do not fit.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        threshold: float = 0.5,
        anchor_style: AnchorStyle = "centred",
        activation: bool = False,
        adapter_init: AdapterInit = "default",
        box_sizes: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        if not scales or not ratios or min(*scales, *ratios) <= 0 or not 0 <= threshold < 1:
            raise ValueError(
                "Expected scales and ratios above 0 and a threshold in [0, 1), "
                f"got {tuple(scales)}, {tuple(ratios)} and {threshold}"
            )
        if anchor_style not in ("centred", "inclusive"):
            raise ValueError(f"Expected an anchor style out of centred, inclusive, got {anchor_style!r}")
        self.align = MapAdapter(student_channels, teacher_channels, always=True, init=adapter_init, kernel_size=3)
        self.activation = activation
        self.scales = tuple(scales)
        self.ratios = tuple(ratios)
        self.threshold = threshold
        self.anchor_style: AnchorStyle = anchor_style
        self.box_sizes = box_sizes

    def forward(
        self, student: Tensor, teacher: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]
    ) -> Tensor:
        """Half the mean squared distance of the imitated positions, summed over channels."""
        student, teacher = self.align(student, teacher)
        with full_precision(student):
            student = student.relu() if self.activation else student
            mask = self.mask(teacher, boxes, image_size=image_size).to(teacher.dtype)
            return ((student - teacher).square() * mask).sum() / (2 * mask.sum()).clamp_min(1)

    @torch.no_grad()
    def mask(self, feature: Tensor, boxes: Sequence[Tensor], *, image_size: tuple[int, int]) -> Tensor:
        """The positions I of a map (B, C, H, W) that are imitated: (B, 1, H, W) bool."""
        height, width = feature.shape[-2:]
        corners, present = padded_boxes(boxes, like=feature)
        vertical, horizontal = level_anchors(
            (height, width),
            (image_size[0] / height, image_size[1] / width),
            scales=self.scales,
            ratios=self.ratios,
            style=self.anchor_style,
            like=feature,
        )
        sizes = ((corners[..., 2] - corners[..., 0] + 1) * (corners[..., 3] - corners[..., 1] + 1)).clamp_min(0).sqrt()
        present = present & (sizes >= self.box_sizes[0]) & (sizes < self.box_sizes[1])
        mask = torch.zeros(feature.shape[0], height, width, dtype=torch.bool, device=feature.device)
        for some, some_present in in_portions(corners, present):
            if some.shape[1] == 0:
                continue
            overlap = self._overlap(some, vertical, horizontal)
            bound = self.threshold * overlap.amax(dim=(2, 3, 4), keepdim=True)
            near = (overlap > bound) & some_present[..., None, None, None]
            mask = mask | near.any(dim=2).any(dim=1)
        return mask.unsqueeze(1)

    def _overlap(self, boxes: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
        """IoU (B, N, A, H, W) of boxes (B, N, 4) with anchors; 0 for boxes without area."""
        extra = 1.0 if self.anchor_style == "inclusive" else 0.0
        sides, overlaps, lengths = [], [], []
        for axis, anchors in ((1, vertical), (0, horizontal)):
            first, last = boxes[..., axis, None, None], boxes[..., axis + 2, None, None]
            shared = torch.minimum(last, anchors[..., 1]) - torch.maximum(first, anchors[..., 0]) + extra
            overlaps.append(shared.clamp_min(0))
            sides.append(anchors[..., 1] - anchors[..., 0] + extra)
            lengths.append((last - first + extra)[..., None])
        shared_area = overlaps[0].unsqueeze(4) * overlaps[1].unsqueeze(3)
        anchor_area = sides[0].unsqueeze(2) * sides[1].unsqueeze(1)
        union = lengths[0] * lengths[1] + anchor_area - shared_area
        width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
        # A point counts as padding in the inclusive convention, which would otherwise give it a pixel.
        has_area = (width >= 0) & (height >= 0) & (width + height > 0)
        return torch.where(has_area[..., None, None, None], shared_area / union, 0.0)
