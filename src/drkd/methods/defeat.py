"""DeFeat: features apart for foreground and background, and the classes of proposed regions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from drkd.contracts import Decay, DetectionBatch, DetectorOutput, DetectorSpec, DrkdError, KDMethod, Want
from drkd.losses import (
    AdapterInit,
    adapt,
    choose_levels,
    class_divergence,
    decoupled_distance,
    foreground_mask,
    make_adapter,
    resample,
)
from drkd.losses.alignment import check_maps
from drkd.methods.levels import Levels, MissingLevels, maps_by_name, match_levels
from drkd.methods.prediction_pairs import TeacherClasses
from drkd.methods.term_weights import choose_weight


class DeFeat(KDMethod):
    """Decoupled features (DeFeat, Guo et al., CVPR 2021, arXiv:2103.14475), see `decoupled_distance`.

    A 3x3 convolution on the student's side of each level. A box is foreground on one level, by its size. The two parts
    of a level are one term, so that their proportion stays the authors' when terms are balanced.

    Where both detectors are two-stage, the classes of the regions that the student sampled are distilled too: the mean
    KL divergence over positive regions plus that over negative ones. For any other pair that part is off.

    Deviations: the neck only, no backbone maps; maps of unequal channels or sizes are adapted (there an error); the
    authors' weight and temperature of the region part are not known to us, both are 1 here.

    Args:
        student: The student.
        teacher: The teacher; levels are matched by stride.
        weight: Of the term ``decoupled``; None is 1.
        foreground_weight: Within that term; the authors' for COCO (VOC: 3).
        background_weight: Within that term; same (VOC: 12).
        region_weight: Of the term ``regions``; None is 1 where both detectors are two-stage, else 0. 0 leaves it out.
        temperature: Of the region classes, > 0.
        size_per_stride: A box belongs to a level from this many of its strides on, see `choose_levels`; the authors' 14
            is for images of 800 px, and puts every box of a small image on the finest level.
        adapter_init: Start of the 3x3 convolutions, see `make_adapter`; ``default`` draws a random basis.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether weights are gradient ratios, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If pyramids or classes do not match, or regions are asked of detectors that have none.
        ValueError: If an argument is out of range.
    """

    reads_boxes: ClassVar[bool] = True

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        foreground_weight: float = 4.0,
        background_weight: float = 16.0,
        region_weight: float | None = None,
        temperature: float = 1.0,
        size_per_stride: float = 14.0,
        adapter_init: AdapterInit = "default",
        levels: Levels | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
    ) -> None:
        super().__init__()
        if min(foreground_weight, background_weight) < 0 or foreground_weight + background_weight <= 0:
            raise ValueError(
                "Expected foreground_weight and background_weight of at least 0 and not both 0, "
                f"got {foreground_weight} and {background_weight}"
            )
        if temperature <= 0:
            raise ValueError(f"Expected a temperature above 0, got {temperature}")
        if size_per_stride <= 0:
            raise ValueError(f"Expected a size_per_stride above 0, got {size_per_stride}")
        self.pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        self.adapters = nn.ModuleList(
            make_adapter(pair.student.channels, pair.teacher.channels, init=adapter_init, kernel_size=3)
            for pair in self.pairs
        )
        self.foreground_weight = foreground_weight
        self.background_weight = background_weight
        self.temperature = temperature
        self.size_per_stride = size_per_stride
        self.weights = {"decoupled": choose_weight(weight, balanced=balanced, plain=1.0)}
        self.minimum_boxes = {} if background_weight > 0 else {"decoupled": 1}
        self.classes: TeacherClasses | None = None
        self.teacher_needs = self.needs
        if self._wants_regions(student, teacher, region_weight):
            self.classes = TeacherClasses(student, teacher, method="DeFeat with a region_weight")
            self.weights["regions"] = choose_weight(region_weight, balanced=balanced, plain=1.0)
            self.needs = frozenset[Want]({"features", "regions"})
            self.teacher_needs = frozenset[Want]({"features", "region_head"})
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay

    @staticmethod
    def _wants_regions(student: DetectorSpec, teacher: DetectorSpec, region_weight: float | None) -> bool:
        """Whether the region part is on."""
        kinds = [spec.predictions.kind if spec.predictions is not None else "none" for spec in (student, teacher)]
        possible = kinds == ["regions", "regions"]
        if region_weight is not None and region_weight > 0 and not possible:
            raise DrkdError(
                "DeFeat distils region classes between two two-stage detectors (faster_rcnn), got a student "
                f"({student.family or 'unknown'}) with predictions of kind {kinds[0]} and a teacher "
                f"({teacher.family or 'unknown'}) of kind {kinds[1]}. Leave region_weight out: the features are "
                "distilled without it."
            )
        return possible and region_weight != 0

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level, ``decoupled/<level>``, and ``regions`` for two-stage pairs."""
        ours, theirs = maps_by_name(student.features), maps_by_name(teacher.features)
        corners = torch.cat(batch.boxes) if batch.boxes else batch.images.new_zeros(0, 4)
        strides = [pair.student.stride for pair in self.pairs]
        chosen = choose_levels(corners, strides, cells=self.size_per_stride)
        terms: dict[str, Tensor] = {}
        for place, (pair, adapter) in enumerate(zip(self.pairs, self.adapters, strict=True)):
            feature, target = ours[pair.student.name], theirs[pair.teacher.name]
            check_maps(feature, target, student_channels=pair.student.channels, teacher_channels=pair.teacher.channels)
            size = (target.shape[2], target.shape[3])
            mask = foreground_mask(batch.boxes, size, image_size=batch.image_size, counted=chosen == place)
            foreground, background = decoupled_distance(resample(adapt(adapter, feature), size), target, mask)
            parts = self.foreground_weight * foreground + self.background_weight * background
            terms[f"decoupled/{pair.name}"] = parts / len(self.pairs)
        if self.classes is not None:
            terms["regions"] = self._regions(student, teacher, self.classes)
        return terms

    def _regions(self, student: DetectorOutput, teacher: DetectorOutput, classes: TeacherClasses) -> Tensor:
        ours, head = student.regions, teacher.region_head
        if ours is None or ours.labels is None or head is None:
            raise ValueError("Expected a student with matched regions and a teacher with a region_head")
        target = classes.logits(head(ours.regions).logits, background=True)
        positive = classes.known(ours.labels).float()
        negative = (ours.labels == ours.boxes.shape[1]).float()
        logits = classes.student_logits(ours.logits, background=True)
        parts = [
            class_divergence(logits, target, part, temperature=self.temperature, activation="softmax")
            for part in (positive, negative)
        ]
        return parts[0] + parts[1]
