"""The vocabulary that every part of drkd speaks: batches, targets, detectors, features, methods.

Everything that crosses a package boundary is one of the frozen dataclasses below or one of the abstract classes.
This module imports torch only, and nothing of drkd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

Size = tuple[int, int]
"""Height and width in pixels, in this order."""

Want = Literal[
    "features", "losses", "predictions", "assignment", "head_features", "head_tail", "regions", "region_head"
]
"""What a caller asks a detector to compute: a field of `DetectorOutput`, by its name."""

PredictionKind = Literal["anchors", "default_boxes", "points", "regions"]
"""How a detector predicts; see `PredictionLayout`."""

Decay = Literal["none", "cosine"]
"""How a method grows quieter over a run; see `KDMethod.schedule`."""


LARGEST_SIDE = 32_768
"""Longest side of an image that a recipe or a file may ask for, px: more is no photograph, and takes the memory."""


class DrkdError(ValueError):
    """Something that the user can put right. The message is one readable paragraph; the command line prints it bare."""


class MachineError(RuntimeError):
    """The machine lacks something, memory or open files say: no fault of the file that it shows at, so no `DrkdError`.

    The message is one readable paragraph too.
    """


class NotApplicableError(DrkdError):
    """A method cannot work with a pair of detectors by its nature: no setting of the method would put that right."""


@dataclass(frozen=True)
class PackedMask:
    """The pixels of one instance, as COCO's compressed run lengths.

    Args:
        size: Height and width of the stored image, px.
        counts: The run lengths, down the columns.
    """

    size: Size
    counts: bytes


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
        masks: N masks; None where the reader was not asked for them.
        turned: Size and boxes are those of the image as a viewer shows it, turned as its EXIF data say (YOLO's
            convention); otherwise those of the stored image.
        labelled: Whether the boxes are known; an image without labels has none here, which says nothing about it.
    """

    image_id: int
    path: Path
    size: Size
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor
    masks: tuple[PackedMask, ...] | None = None
    turned: bool = False
    labelled: bool = True


@dataclass(frozen=True)
class BoxTargets:
    """Ground truth of one image of a batch.

    Args:
        boxes: (N, 4) float32, xyxy px of the batch tensor.
        labels: (N,) int64, 0..K-1, no background class.
        ignore: (N,) bool, boxes that neither train nor count (crowds). Detectors leave them out of their losses; the
            methods take every box for an object, so batches to train on should hold none, as drkd's own do.
        masks: (N, h, w) bool, the instances' pixels in the valid part of their image; None where nobody asked for them.
    """

    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.boxes.shape[0]
        if self.masks is not None and (self.masks.ndim != 3 or self.masks.shape[0] != count):
            raise ValueError(f"BoxTargets expects masks (N, h, w) of {count} boxes, got {tuple(self.masks.shape)}")
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
            None if self.masks is None else self.masks.to(device, non_blocking=non_blocking),
        )


# Brighter than any image in [0, 1], or standardised, and darker than most of one byte a channel.
_BRIGHTEST = 16.0


def _check_listed(image: Tensor, target: Mapping[str, Tensor], number: int) -> None:
    """Refuse what `DetectionBatch.from_lists` cannot take, naming the image by its place."""
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
        shown = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image {number}: expected a tensor (3, H, W), got {shown}")
    if not image.is_floating_point():
        raise ValueError(f"image {number}: expected floats in [0, 1], got {image.dtype}; divide bytes by 255")
    absent = [name for name in ("boxes", "labels") if not isinstance(target.get(name), Tensor)]
    if absent:
        raise ValueError(f"target {number}: expected tensors boxes and labels, got none called {absent[0]}")
    boxes, labels = target["boxes"], target["labels"]
    if labels.ndim != 1 or (len(labels) and labels.is_floating_point()):
        raise ValueError(f"target {number}: expected integer labels (N,), got {tuple(labels.shape)} of {labels.dtype}")
    if boxes.numel() != 4 * len(labels) or (len(labels) and boxes.ndim != 2):
        raise ValueError(f"target {number}: expected boxes ({len(labels)}, 4), got {tuple(boxes.shape)}")
    if image.device.type == "cpu" and image.numel() and float(image[:, ::16, ::16].amax()) > _BRIGHTEST:
        raise ValueError(f"image {number}: expected values in [0, 1], got larger ones; divide bytes by 255")
    if boxes.device.type == "cpu" and len(labels):
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError(
                f"target {number}: expected boxes as xyxy with x1 < x2 and y1 < y2; has one no area, or are they xywh, "
                "or NaN?"
            )
        if float(boxes.amax()) <= 1 < min(image.shape[1:]):
            raise ValueError(f"target {number}: expected boxes in px, got none that reaches past 1; are they relative?")


class DetectorTransform(Protocol):
    """The part of torchvision's ``GeneralizedRCNNTransform`` that moves pixels."""

    size_divisible: int

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resize an image (3, H, W) with its boxes and masks."""


def _resize(
    transform: DetectorTransform, image: Tensor, target: Mapping[str, Tensor]
) -> tuple[Tensor, Mapping[str, Tensor]]:
    # A dict of our own, since torchvision writes the new boxes into it; no boxes have two dimensions as well.
    boxes = target["boxes"].float().reshape(-1, 4)
    image, moved = transform.resize(image, {**target, "boxes": boxes})
    assert moved is not None  # it was given a target
    return image, moved


@dataclass(frozen=True)
class DetectionBatch:
    """A padded batch of images with their targets, in one pixel frame.

    Args:
        images: (B, 3, H, W) float, RGB in [0, 1], zero outside each image's valid part (top left).
        sizes: Height and width of each image's valid part, px of ``images``.
        original_sizes: Height and width of each image as stored, px.
        targets: One entry an image, in px of ``images``. Crowds are already left out of training batches.
        image_ids: One entry an image.
        labelled: For each image, whether its boxes are known; empty where all are. On the host, so that asking costs
            no synchronisation.
    """

    images: Tensor
    sizes: tuple[Size, ...]
    original_sizes: tuple[Size, ...]
    targets: tuple[BoxTargets, ...]
    image_ids: tuple[int, ...]
    labelled: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"DetectionBatch expects images (B, 3, H, W), got {tuple(self.images.shape)}")
        lengths = {len(self.sizes), len(self.original_sizes), len(self.targets), len(self.image_ids)}
        if lengths != {self.images.shape[0]}:
            raise ValueError(
                f"DetectionBatch expects one size, original size, target and id for each of {self.images.shape[0]} "
                f"images, got lengths {sorted(lengths)}"
            )
        if self.labelled and len(self.labelled) != len(self.image_ids):
            raise ValueError(
                f"DetectionBatch expects labelled to be empty or one entry for each of {len(self.image_ids)} images, "
                f"got {len(self.labelled)}"
            )

    @classmethod
    def from_lists(
        cls,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        *,
        first_label: int = 0,
        size_divisor: int | None = None,
        transform: DetectorTransform | None = None,
    ) -> DetectionBatch:
        """Make a batch of what torchvision's detectors take, padded.

        Args:
            images: (3, H, W) each, RGB in [0, 1].
            targets: ``boxes`` (N, 4) xyxy px and ``labels`` (N,) of each image; ``masks`` (N, h, w) where there are
                any.
            first_label: Number of the first class in ``labels``; 1 where 0 means background.
            size_divisor: The batch's sides are padded to multiples of it, px; by default the transform's, or 32.
            transform: A torchvision detector's ``model.transform``. The detector resizes images itself when it is
                called, and not when drkd trains it: with its transform images, boxes and masks are resized here as
                it would (in training it draws one of several sizes), or hand over images of the size that it will
                see. Normalisation is left to the detector. None: images stay as large as they are.

        Raises:
            ValueError: If images and targets are not as described, or a label lies below ``first_label``. Values of
                tensors on a GPU are not looked at, since that would wait for it.
        """
        if len(images) != len(targets) or not len(images):
            raise ValueError(f"expected one target an image and at least one, got {len(images)} and {len(targets)}")
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            _check_listed(image, target, number)
        original_sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
        if transform is not None:
            resized = [_resize(transform, image, target) for image, target in zip(images, targets, strict=True)]
            images, targets = [image for image, _ in resized], [target for _, target in resized]
        if size_divisor is None:
            size_divisor = 32 if transform is None else transform.size_divisible
        sizes = tuple((int(image.shape[-2]), int(image.shape[-1])) for image in images)
        height, width = (-(-max(side) // size_divisor) * size_divisor for side in zip(*sizes, strict=True))
        padded = images[0].new_zeros(len(images), 3, height, width)
        found = []
        for place, image, target in zip(padded, images, targets, strict=True):
            place[:, : image.shape[-2], : image.shape[-1]] = image
            labels = target["labels"].to(torch.int64) - first_label
            if labels.device.type == "cpu" and bool((labels < 0).any()):
                raise ValueError(f"a label lies below first_label={first_label}")
            ignore = torch.zeros_like(labels, dtype=torch.bool)
            masks = target["masks"].bool() if "masks" in target else None
            found.append(BoxTargets(target["boxes"].float().reshape(-1, 4), labels, ignore, masks))
        return cls(padded, sizes, original_sizes, tuple(found), tuple(range(len(images))))

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

    def select(self, rows: Sequence[int]) -> DetectionBatch:
        """The batch of some of the images, of the same padded size; a view where the rows follow one another.

        Args:
            rows: Positions of the images, at least one.
        """
        first, last = rows[0], rows[-1]
        run = list(rows) == list(range(first, last + 1))
        return DetectionBatch(
            images=self.images[first : last + 1] if run else self.images[list(rows)],
            sizes=tuple(self.sizes[row] for row in rows),
            original_sizes=tuple(self.original_sizes[row] for row in rows),
            targets=tuple(self.targets[row] for row in rows),
            image_ids=tuple(self.image_ids[row] for row in rows),
            labelled=tuple(self.labelled[row] for row in rows) if self.labelled else (),
        )

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
                BoxTargets(
                    t.boxes.pin_memory(),
                    t.labels.pin_memory(),
                    t.ignore.pin_memory(),
                    None if t.masks is None else t.masks.pin_memory(),
                )
                for t in self.targets
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
class PredictionLayout:
    """What a detector predicts and where, so that a method can refuse a pair that does not fit.

    - ``anchors``: at every cell of the pyramid and for each of its anchors, K class sigmoids and the box's offsets.
    - ``default_boxes``: the same with a softmax of K classes and the background in place of the sigmoids (SSD).
    - ``points``: at every cell, K class sigmoids, distances to the box's sides and, of FCOS, a centerness.
    - ``regions``: for proposed regions, a softmax of K classes and the background, and offsets for each class.

    Args:
        kind: See above.
        anchors: Of each level, width and height of each anchor of a cell, px; for points the side that distances are
            measured in. Empty for regions.
        head_channels: Channels inside the two branches of a dense head; 0 where the head cannot be cut.
        head_depth: Convolutions in each branch; 0 where the head cannot be cut.
        box_bins: Bins of the distribution of each side of a box; 0 where a side is one number.
        missing_classes: Classes that the head has no output for.
        centre_offset: Where in its cell an anchor's or point's centre lies, as a share of the cell's sides: 0 at the
            top left corner, 0.5 in the middle.
    """

    kind: PredictionKind
    anchors: tuple[tuple[tuple[float, float], ...], ...] = ()
    head_channels: int = 0
    head_depth: int = 0
    box_bins: int = 0
    missing_classes: tuple[str, ...] = ()
    centre_offset: float = 0.0


@dataclass(frozen=True)
class DetectorSpec:
    """What a method needs to know of a detector before it sees a batch.

    Args:
        levels: The pyramid, finest first.
        class_names: Names of classes 0..K-1, no background.
        family: The detector's kind ("retinanet", "faster_rcnn", "fcos"), for messages.
        predictions: What the detector can show of its predictions; None where nothing.
    """

    levels: tuple[FeatureLevel, ...]
    class_names: tuple[str, ...]
    family: str = ""
    predictions: PredictionLayout | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes without background."""
        return len(self.class_names)


@dataclass(frozen=True)
class DensePredictions:
    """What a one-stage head predicts; A predictions an image, level by level, row by row, anchor by anchor.

    Args:
        logits: (B, A, K), before the sigmoid, classes in drkd's order. Of default boxes (B, A, K + 1), before the
            softmax, the background last.
        boxes: (B, A, 4), as the head codes them. Of anchors, the offsets dx, dy, dw, dh: the centre's shift in units of
            the anchor's sides, and the logarithm of the sides' growth. Of points, the distances left, top, right,
            bottom from the anchor's centre in units of its sides.
        anchors: (A, 4), xyxy px of the batch tensor, the same for all images.
        counts: Predictions of each level; their sum is A.
        centerness: (B, A), before the sigmoid; points only, where the head has one.
        bins: (B, A, 4, n), logits over the bins of each side; where the spec has ``box_bins`` n.
    """

    logits: Tensor
    boxes: Tensor
    anchors: Tensor
    counts: tuple[int, ...]
    centerness: Tensor | None = None
    bins: Tensor | None = None


@dataclass(frozen=True)
class HeadFeatures:
    """What the two branches of a dense head computed on their way.

    Args:
        classification: After each convolution with its norm and activation, the maps (B, C, h, w) of each level.
        regression: The same of the other branch.
    """

    classification: tuple[tuple[Tensor, ...], ...]
    regression: tuple[tuple[Tensor, ...], ...]


class HeadTail(Protocol):
    """The end of a dense head, to be called on another detector's `HeadFeatures`; gradient flows to its arguments."""

    def __call__(
        self, classification: Sequence[Tensor], regression: Sequence[Tensor], *, after: int
    ) -> DensePredictions:
        """Predict from the maps (B, C, h, w) of each level as they are after ``after`` convolutions."""

    def climb(self, maps: Sequence[Tensor]) -> HeadFeatures:
        """What the head's branches compute, convolution by convolution, on pyramid maps (B, C, h, w)."""


@dataclass(frozen=True)
class RegionPredictions:
    """What a two-stage head predicts for R regions, image by image.

    Args:
        regions: Of each image, (R_b, 4), xyxy px of the batch tensor, without gradient; R is their sum.
        logits: (R, K + 1), before the softmax, classes in drkd's order, the background last.
        boxes: (R, K, 4), for each class the offsets dx, dy, dw, dh from the region, as `DensePredictions` has them.
        labels: (R,) int64, the class of the box that a region is matched with, K for the background; None where the
            regions were not matched.
        matched_at_most: No image has more regions that are matched with a box; None is no such bound. Known without
            reading ``labels``, so that nobody has to wait for a device to skip the background.
    """

    regions: tuple[Tensor, ...]
    logits: Tensor
    boxes: Tensor
    labels: Tensor | None = None
    matched_at_most: int | None = None


class RegionHead(Protocol):
    """A two-stage head on its detector's own features, to be called on another detector's regions."""

    def __call__(self, regions: Sequence[Tensor]) -> RegionPredictions:
        """Predict for the regions (R_b, 4) of each image, xyxy px of the batch tensor."""


@dataclass(frozen=True)
class DetectorOutput:
    """What a detector computed for a batch; a field that was not asked for is empty.

    Args:
        features: The pyramid, in the order of the spec's levels.
        losses: Unweighted-by-us task losses by name, 0-d tensors; the total task loss is their sum.
        predictions: Of a one-stage head.
        assignment: (B, A) int64, what the task losses match each of the dense predictions with: the index of a box of
            its image's targets, -1 for the background, -2 for neither. Needs the batch's targets.
        head_features: Inside a one-stage head.
        head_tail: The end of a one-stage head; computes nothing until it is called.
        regions: Of a two-stage head, on the regions that its task losses were sampled on. Needs the batch's targets.
        region_head: A two-stage head for given regions; computes nothing until it is called.
        members: Of a group of teachers, the output of each by name.
    """

    features: tuple[FeatureMap, ...] = ()
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    predictions: DensePredictions | None = None
    assignment: Tensor | None = None
    head_features: HeadFeatures | None = None
    head_tail: HeadTail | None = None
    regions: RegionPredictions | None = None
    region_head: RegionHead | None = None
    members: Mapping[str, DetectorOutput] = field(default_factory=dict)


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

    @property
    def body_names(self) -> tuple[str, ...]:
        """Beginnings of the names in the model's state dict that belong to the backbone's body."""
        return ("backbone.body.",)

    @property
    def can_detect(self) -> bool:
        """Whether ``detect`` works; a detector without heads, or wrapped without its detections, has features alone."""
        return True

    @abstractmethod
    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """Compute what is wanted and nothing else, in train or eval mode alike.

        The type that comes back never depends on ``self.training``. ``losses`` needs the batch's targets.

        Raises:
            ValueError: If something is wanted that a detector of this kind does not have.
        """

    def expect_image_size(self, side: int) -> None:
        """Take note of the side of the batches to come: a detector that resizes them inside declares its strides so.

        Args:
            side: The short side that images are resized to in the data loader, px. Without the call, the spec holds
                for batches of the detector's own size.
        """
        return

    @abstractmethod
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in pixels of the original images, one entry an image. Needs eval mode; makes no gradient.

        Those of drkd's own adapters compute in the precision of the weights also under autocast, whose 16 bits know a
        place beyond 512 px to 4 px only.
        """


class DetectorBuilder(ABC):
    """How to build a detector.

    Implementations are frozen dataclasses of plain values, so that a recipe and a checkpoint can hold them.
    """

    def own_class_names(self) -> tuple[str, ...] | None:
        """The classes that it is bound to, such as those of a trained file; None where it builds any you ask for."""
        return None

    @abstractmethod
    def build(self, class_names: Sequence[str]) -> Detector:
        """Build a detector for these classes.

        Raises:
            DrkdError: If weights cannot be found or do not fit.
        """

    def build_teacher(self, class_names: Sequence[str]) -> Detector:
        """Build one that is to teach, so that nothing may be left untrained where weights are given.

        Raises:
            DrkdError: As ``build``, or if its weights leave the layers that name classes untrained.
        """
        return self.build(class_names)


class KDMethod(nn.Module, ABC):
    """A distillation method: which outputs feed which losses. Owns every trainable connector.

    A subclass takes ``(student: DetectorSpec, teacher: DetectorSpec, *, ...)`` and must not keep references to the
    detectors. A method never applies its weights to the terms: it returns them bare and declares ``weights``.

    Attributes:
        needs: What the student must compute for it. With ``balanced``, "features" is among it: that is where gradient
            norms are measured.
        teacher_needs: What the teacher must compute for it; None where that is the same.
        minimum_boxes: By term (the part of a name before the slash), how many boxes some image of the batch must hold
            for the term to have a gradient. Terms absent from it need none.
        weights: By term, its weight, >= 0. With ``balanced`` it is the wanted ratio of the term's gradient norm at the
            student's features to the task loss's (so 1 means as loud as the task); otherwise a plain multiplier.
        balanced: Whether ``weights`` are gradient ratios.
        warmup_steps: The weights of all terms rise linearly from 0 over this many steps.
        decay: "cosine": they fall to 0 along half a cosine over the whole run, so that the task has the last word;
            where nobody gives the run's length, and with "none", they stay.
        needs_run_length: Whether it has terms in a part of the run only. A `Distiller` that is not told the run's
            length refuses to train it: they would be silently off.
    """

    needs: frozenset[Want] = frozenset({"features"})
    teacher_needs: frozenset[Want] | None = None
    minimum_boxes: Mapping[str, int]
    weights: Mapping[str, float]
    balanced: bool
    warmup_steps: int
    decay: Decay = "none"
    needs_run_length: bool = False

    def schedule(self, step: int, total_steps: int | None = None) -> float:
        """Factor on all weights at an optimizer step, in [0, 1]: the warm-up times the decay.

        Args:
            step: 0-based.
            total_steps: Of the whole run; None, where it is not known, leaves the decay out.

        Raises:
            DrkdError: If ``decay`` is none of `Decay`; a `Distiller` asks when it is built.
        """
        if self.decay not in ("none", "cosine"):
            raise DrkdError(f"{type(self).__name__} expects a decay out of none, cosine, got {self.decay!r}.")
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        if self.decay == "cosine" and total_steps:
            factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        return factor

    def begin_pass(self, number: int, *, measured: bool, progress: float | None = None) -> None:
        """Hear, before `forward`, which pass it is: for a method that leaves a dear term out of some passes.

        `Distiller` tells every method and every method within it; a loop without it need not.

        Args:
            number: Of the forward pass in training, 0-based, the same in every process.
            measured: Gradient norms are measured at this pass: a term that is left out now would be taken for dead.
            progress: Share of the run's optimizer steps that are done, in [0, 1]; None where nobody gives the run's
                length (``total_steps`` of `Distiller`).
        """

    def inner_methods(self) -> dict[str, KDMethod]:
        """The methods whose terms this one returns, by what it puts before their names; none for most."""
        return {}

    def target_spread(self) -> dict[str, Tensor]:
        """By full term name, the standard deviation of what the student's side is compared with, 0-d and detached.

        Of the last pass that was measured (`begin_pass`), for methods that train something on the teacher's side: a
        target that collapses is easy to meet and teaches nothing. Empty where a method does not look.
        """
        return self._of_inner_methods(lambda method: method.target_spread())

    def shared_counts(self) -> dict[str, Tensor]:
        """By full term name, the count, 0-d and detached, that the last `forward` divided the term by, or 1 where less.

        Of terms whose count is meant to be a mean over all processes, as positive anchors in many detectors' losses:
        in training `Distiller` replaces it by that mean, lest a process with few outweigh the others. Empty for most.
        """
        return self._of_inner_methods(lambda method: method.shared_counts())

    def compared_counts(self) -> dict[str, Tensor]:
        """By full term name, how much the last `forward` compared, 0-d and detached: a term of 0 had nothing to say.

        Of terms for which an image with enough boxes (``minimum_boxes``) may still hold nothing, as where none of them
        is of a class that the teacher knows. Empty for most.
        """
        return self._of_inner_methods(lambda method: method.compared_counts())

    def _of_inner_methods(self, ask: Callable[[KDMethod], dict[str, Tensor]]) -> dict[str, Tensor]:
        answers = {prefix: ask(method) for prefix, method in self.inner_methods().items()}
        return {f"{prefix}{term}": value for prefix, answer in answers.items() for term, value in answer.items()}

    @abstractmethod
    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """Return the terms by name, unweighted: 0-d tensors of at least float32.

        A name may carry a level after a slash ("pixel_relation/p3"): terms are balanced one by one and reported both
        one by one and summed over the part before the slash. The set of names is the same at every step.
        """
