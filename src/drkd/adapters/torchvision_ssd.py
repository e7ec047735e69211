"""What sets torchvision's SSDs apart: one fixed input size, default boxes, a softmax with the background on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from drkd.adapters.torchvision_predictions import ClassOrder, unit_offsets
from drkd.contracts import DensePredictions, PredictionLayout, Size


class FixedFrame:
    """The pixel frame of a model that wants every image at one size, beside the frame of the batch.

    Losses and features need one frame for the whole batch, so the padded batch is resized as a whole; detections need
    none, so each image is stretched by itself there, exactly as torchvision does.

    Args:
        size: Height and width that the model wants, px.
    """

    def __init__(self, size: Size) -> None:
        self.size = size

    def whole(self, images: ImageList) -> ImageList:
        """The padded batch at the model's size."""
        return self._list(self._resize(images.tensors), len(images.image_sizes))

    def each(self, images: ImageList) -> ImageList:
        """The valid part of each image at the model's size."""
        parts = [
            self._resize(image[None, :, :height, :width])
            for image, (height, width) in zip(images.tensors, images.image_sizes, strict=True)
        ]
        return self._list(torch.cat(parts), len(parts))

    def to_model(self, boxes: Tensor, image_size: Size) -> Tensor:
        """Boxes xyxy px of a batch of this height and width, in px of the model's frame."""
        return boxes * self._factors(boxes, image_size)

    def to_batch(self, boxes: Tensor, image_size: Size) -> Tensor:
        """The other way round."""
        return boxes / self._factors(boxes, image_size)

    def _factors(self, boxes: Tensor, image_size: Size) -> Tensor:
        y, x = self.size[0] / image_size[0], self.size[1] / image_size[1]
        return boxes.new_tensor([x, y, x, y])

    def _resize(self, images: Tensor) -> Tensor:
        if (images.shape[-2], images.shape[-1]) == self.size:
            return images
        return functional.interpolate(images, size=self.size, mode="bilinear", align_corners=False)

    def _list(self, images: Tensor, count: int) -> ImageList:
        return ImageList(images, [self.size] * count)


def fixed_frame(model: nn.Module) -> FixedFrame | None:
    """The frame of a model whose transform resizes to one size; None for all others."""
    transform: Any = model.transform
    if transform.fixed_size is None:
        return None
    width, height = transform.fixed_size
    return FixedFrame((int(height), int(width)))


def describe_default_boxes(model: nn.Module, size: Size, *, missing_classes: tuple[str, ...]) -> PredictionLayout:
    """The layout of an SSD's predictions, in px of its own frame."""
    untyped: Any = model
    generator = untyped.anchor_generator
    pairs = [cell.clamp(0, 1) if generator.clip else cell for cell in generator._wh_pairs]
    sides = tuple(tuple((w * size[1], h * size[0]) for w, h in cell.tolist()) for cell in pairs)
    return PredictionLayout("default_boxes", sides, missing_classes=missing_classes)


def match_default_boxes(model: nn.Module, targets: Sequence[dict[str, Tensor]], anchors: Sequence[Tensor]) -> Any:
    """Of each image, (A,): the box that a default box is matched with, -1 for the background (Liu et al., 2016)."""
    matcher: Any = model.proposal_matcher
    return [
        matcher(box_iou(target["boxes"], boxes))
        if len(target["boxes"])
        else torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
        for target, boxes in zip(targets, anchors, strict=True)
    ]


def default_box_predictions(
    model: nn.Module,
    order: ClassOrder,
    outputs: dict[str, Tensor],
    anchors: Tensor,
    maps: Sequence[Tensor],
) -> DensePredictions:
    """An SSD's outputs in drkd's terms; ``anchors`` (A, 4) in px of the batch."""
    untyped: Any = model
    each = untyped.anchor_generator.num_anchors_per_location()
    counts = tuple(int(entry.shape[-2] * entry.shape[-1]) * count for entry, count in zip(maps, each, strict=True))
    boxes = unit_offsets(outputs["bbox_regression"], untyped.box_coder.weights)
    return DensePredictions(order.logits(outputs["cls_logits"]), boxes, anchors, counts)
