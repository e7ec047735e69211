"""The vocabulary that every part of drkd speaks: batches, targets, detectors, features, methods.

Everything that crosses a package boundary is one of the frozen dataclasses below or one of the abstract classes.
This module imports torch only, and nothing of drkd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

Size = tuple[int, int]
"""Height and width in pixels, in this order."""

Want = Literal["features", "losses"]
"""What a caller asks a detector to compute."""


class DrkdError(ValueError):
    """Something that the user can put right. The message is one readable paragraph; the command line prints it bare."""


@dataclass(frozen=True)
class ImageRecord:
    """One annotated image of a data set, as a format reader returns it.

    Args:
        image_id: Unique within the data set.
        path: Image file.
        size: Height and width of the stored image, px.
        boxes: (N, 4) float32, xyxy px of the stored image.
        labels: (N,) int64, 0..K-1.
        crowd: (N,) bool, COCO's ``iscrowd``: ignored in training, matched as COCO does in evaluation.
        areas: (N,) float32, px^2, what AP_S/M/L are split by (COCO's ``area``).
    """

    image_id: int
    path: Path
    size: Size
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor


@dataclass(frozen=True)
class BoxTargets:
    """Ground truth of one image of a batch.

    Args:
        boxes: (N, 4) float32, xyxy px of the batch tensor.
        labels: (N,) int64, 0..K-1, no background class.
        ignore: (N,) bool, boxes that neither train nor count (crowds).
    """

    boxes: Tensor
    labels: Tensor
    ignore: Tensor

    def __post_init__(self) -> None:
        count = self.boxes.shape[0]
        if self.boxes.shape != (count, 4) or self.labels.shape != (count,) or self.ignore.shape != (count,):
            raise ValueError(
                "BoxTargets expects boxes (N, 4), labels (N,) and ignore (N,), "
                f"got {tuple(self.boxes.shape)}, {tuple(self.labels.shape)} and {tuple(self.ignore.shape)}"
            )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BoxTargets:
        """Copy to a device."""
        return BoxTargets(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.ignore.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class DetectionBatch:
    """A padded batch of images with their targets, in one pixel frame.

    Args:
        images: (B, 3, H, W) float, RGB in [0, 1], zero outside each image's valid part (top left).
        sizes: Height and width of each image's valid part, px of ``images``.
        original_sizes: Height and width of each image as stored, px.
        targets: One entry an image, in px of ``images``. Crowds are already left out of training batches.
        image_ids: One entry an image.
    """

    images: Tensor
    sizes: tuple[Size, ...]
    original_sizes: tuple[Size, ...]
    targets: tuple[BoxTargets, ...]
    image_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"DetectionBatch expects images (B, 3, H, W), got {tuple(self.images.shape)}")
        lengths = {len(self.sizes), len(self.original_sizes), len(self.targets), len(self.image_ids)}
        if lengths != {self.images.shape[0]}:
            raise ValueError(
                f"DetectionBatch expects one size, original size, target and id for each of {self.images.shape[0]} "
                f"images, got lengths {sorted(lengths)}"
            )

    @classmethod
    def from_lists(
        cls,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        *,
        first_label: int = 0,
        size_divisor: int = 32,
    ) -> DetectionBatch:
        """Make a batch of what torchvision's detectors take, padding but not resizing.

        Args:
            images: (3, H, W) each, RGB in [0, 1].
            targets: ``boxes`` (N, 4) xyxy px and ``labels`` (N,) of each image.
            first_label: Number of the first class in ``labels``; 1 where 0 means background.
            size_divisor: The batch's sides are padded to multiples of it, px.

        Raises:
            ValueError: If images and targets are not as described, or a label lies below ``first_label``.
        """
        if len(images) != len(targets) or not images:
            raise ValueError(f"expected one target an image and at least one, got {len(images)} and {len(targets)}")
        sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
        height, width = (-(-max(side) // size_divisor) * size_divisor for side in zip(*sizes, strict=True))
        padded = images[0].new_zeros(len(images), 3, height, width)
        found = []
        for place, image, target in zip(padded, images, targets, strict=True):
            place[:, : image.shape[-2], : image.shape[-1]] = image
            labels = target["labels"].to(torch.int64) - first_label
            if labels.device.type == "cpu" and bool((labels < 0).any()):
                raise ValueError(f"a label lies below first_label={first_label}")
            found.append(BoxTargets(target["boxes"].float(), labels, torch.zeros_like(labels, dtype=torch.bool)))
        return cls(padded, sizes, sizes, tuple(found), tuple(range(len(images))))

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def image_size(self) -> Size:
        """Height and width of the padded tensor, px."""
        return int(self.images.shape[-2]), int(self.images.shape[-1])

    @property
    def boxes(self) -> list[Tensor]:
        """Ground-truth boxes, one (N_b, 4) tensor an image, xyxy px of ``images``."""
        return [target.boxes for target in self.targets]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DetectionBatch:
        """Copy to a device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=tuple(target.to(device, non_blocking=non_blocking) for target in self.targets),
        )

    def pin_memory(self) -> DetectionBatch:
        """Copy into page-locked memory (called by torch's DataLoader)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=tuple(
                BoxTargets(t.boxes.pin_memory(), t.labels.pin_memory(), t.ignore.pin_memory()) for t in self.targets
            ),
        )


@dataclass(frozen=True)
class FeatureLevel:
    """One level of a detector's pyramid, as declared by the detector.

    Args:
        name: Unique within the detector.
        channels: Number of channels.
        stride: Pixels of the input an output cell stands for; may be fractional, two levels may share one.
    """

    name: str
    channels: int
    stride: float


@dataclass(frozen=True)
class FeatureMap:
    """One level of a pyramid, computed.

    Args:
        name: The level's name.
        tensor: (B, C, h, w).
        stride_y: Pixels of the batch tensor a cell stands for, vertically: H / h.
        stride_x: The same horizontally: W / w.
    """

    name: str
    tensor: Tensor
    stride_y: float
    stride_x: float


@dataclass(frozen=True)
class DetectorSpec:
    """What a method needs to know of a detector before it sees a batch.

    Args:
        levels: The pyramid, finest first.
        class_names: Names of classes 0..K-1, no background.
        family: The detector's kind ("retinanet", "faster_rcnn", "fcos"), for messages.
    """

    levels: tuple[FeatureLevel, ...]
    class_names: tuple[str, ...]
    family: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes without background."""
        return len(self.class_names)


@dataclass(frozen=True)
class DetectorOutput:
    """What a detector computed for a batch; a field that was not asked for is empty.

    Args:
        features: The pyramid, in the order of the spec's levels.
        losses: Unweighted-by-us task losses by name, 0-d tensors; the total task loss is their sum.
    """

    features: tuple[FeatureMap, ...] = ()
    losses: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Detections:
    """Detections of one image.

    Args:
        boxes: (N, 4) float32, xyxy px of the original image.
        scores: (N,) float32 in [0, 1], descending.
        labels: (N,) int64, 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class Detector(nn.Module, ABC):
    """A detector seen through drkd's eyes: it wraps the user's own module and adds nothing to it.

    Attributes:
        model: The plain detector, exactly as its library knows it. Its state dict is what is saved.
        spec: Levels, classes.
    """

    model: nn.Module
    spec: DetectorSpec

    @abstractmethod
    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute what is wanted and nothing else, in train or eval mode alike.

        The type that comes back never depends on ``self.training``. ``losses`` needs the batch's targets.
        """

    @abstractmethod
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in pixels of the original images, one entry an image. Needs eval mode; makes no gradient."""


class DetectorBuilder(ABC):
    """How to build a detector.

    Implementations are frozen dataclasses of plain values, so that a recipe and a checkpoint can hold them.
    """

    @abstractmethod
    def build(self, class_names: Sequence[str]) -> Detector:
        """Build a detector for these classes.

        Raises:
            DrkdError: If weights cannot be found or do not fit.
        """


class KDMethod(nn.Module, ABC):
    """A distillation method: which outputs feed which losses. Owns every trainable connector.

    A subclass takes ``(student: DetectorSpec, teacher: DetectorSpec, *, ...)`` and must not keep references to the
    detectors. A method never applies its weights to the terms: it returns them bare and declares ``weights``.

    Attributes:
        needs: What the student and teacher must compute for it.
        minimum_boxes: By term (the part of a name before the slash), how many boxes some image of the batch must hold
            for the term to have a gradient. Terms absent from it need none.
        weights: By term, its weight, >= 0. With ``balanced`` it is the wanted ratio of the term's gradient norm at the
            student's features to the task loss's (so 1 means as loud as the task); otherwise a plain multiplier.
        balanced: Whether ``weights`` are gradient ratios.
        warmup_steps: The weights of all terms rise linearly from 0 over this many steps.
    """

    needs: frozenset[Want] = frozenset({"features"})
    minimum_boxes: Mapping[str, int]
    weights: Mapping[str, float]
    balanced: bool
    warmup_steps: int

    @abstractmethod
    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """Return the terms by name, unweighted: 0-d tensors of at least float32.

        A name may carry a level after a slash ("pixel_relation/p3"): terms are balanced one by one and reported both
        one by one and summed over the part before the slash. The set of names is the same at every step.
        """
