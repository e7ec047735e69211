"""Localization distillation, for heads that predict a distribution over the position of each side of a box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.contracts import Decay, DetectionBatch, DetectorOutput, DetectorSpec, KDMethod, NotApplicableError, Want
from drkd.losses import bin_divergence, valuable_region
from drkd.losses.distance import at_least_float32, full_precision
from drkd.methods.prediction_pairs import ON_FEATURES, TeacherClasses, require_layouts, require_same_grid
from drkd.methods.term_weights import choose_weight

# What the authors divide by: the four sides, and 16 in the valuable region.
_MAIN, _VALUABLE = 4.0, 16.0
# Sides of the authors' anchors, in strides.
_ANCHOR = 8.0


class LD(KDMethod):
    """Localization distillation (LD, Zheng et al., CVPR 2022, arXiv:2102.12252), see `bin_divergence`.

    The bins of positive anchors, weighted by the student's largest class probability; those of the valuable region
    (see `valuable_region`), weighted by its value; and the classes of positive anchors, as a softmax over classes. With
    one class (or one that both know) that softmax says nothing, and the term is left out.

    Ultralytics' YOLOs up to 12 predict bins; no head of torchvision does, nor YOLO26. A detector of your own that fills
    ``DensePredictions.bins`` is served too.

    Deviation: the valuable region takes one ``positive_overlap`` for all boxes, where the authors' assigner has one for
    each, and leaves out anchors that are positive. Heads that predict at points (YOLO) have no anchors; the region is
    then found with squares of 8 strides around the points, as large as the authors' anchors, and for boxes too small
    for those with the cells themselves.

    Args:
        student: The student, with as many bins as the teacher.
        teacher: The teacher, of the same kind and anchors, with some of the student's classes, in any order.
        localization_weight: Of the term ``localization``; None is 1 where balanced, else the authors' 0.25.
        valuable_weight: Of the term ``valuable_region``; same.
        class_weight: Of the term ``classification``; None is 1 where balanced, else the authors' 10.
        temperature: Of the bins, > 0.
        class_temperature: Of the classes, > 0.
        positive_overlap: Distance overlap from which an anchor is not in the valuable region.
        valuable_share: The valuable region starts at this share of it.
        balanced: Whether weights are gradient ratios, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If a detector has no bins, or the two do not fit together.
        ValueError: If an argument is out of range.
    """

    needs = frozenset[Want]({"features", "predictions", "assignment"})
    teacher_needs = frozenset[Want]({"predictions"})

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        localization_weight: float | None = None,
        valuable_weight: float | None = None,
        class_weight: float | None = None,
        temperature: float = 10.0,
        class_temperature: float = 2.0,
        positive_overlap: float = 0.5,
        valuable_share: float = 0.25,
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
    ) -> None:
        super().__init__()
        if min(temperature, class_temperature) <= 0:
            raise ValueError(f"Expected temperatures above 0, got {temperature} and {class_temperature}")
        bins = [0 if spec.predictions is None else spec.predictions.box_bins for spec in (student, teacher)]
        if not bins[0] or bins[0] != bins[1]:
            raise NotApplicableError(
                "LD distils distributions over the bins of a box's sides and expects detectors whose heads predict as "
                f"many bins (YOLOv8 to 12, GFL and its kin), got {bins[0]} bins from the student "
                f"({student.family or 'unknown'}) and {bins[1]} from the teacher ({teacher.family or 'unknown'}); "
                "heads that predict each side as one number, as all of torchvision's do, have 0. Use CrossKD or "
                f"LogitKD, or {ON_FEATURES}."
            )
        ours, _ = require_layouts(student, teacher, method="LD", kinds=("anchors", "points"))
        self.points = ours.kind == "points"
        require_same_grid(student, teacher, method="LD")
        self.classes = TeacherClasses(student, teacher, method="LD")
        self.reads_boxes = True  # image by image, of as many as each has
        self.temperature = temperature
        self.class_temperature = class_temperature
        self.positive_overlap = positive_overlap
        self.valuable_share = valuable_share
        self.weights = {
            "localization": choose_weight(localization_weight, balanced=balanced, plain=0.25),
            "valuable_region": choose_weight(valuable_weight, balanced=balanced, plain=0.25),
            "classification": choose_weight(class_weight, balanced=balanced, plain=10.0),
        }
        if self.classes.count == 1:
            del self.weights["classification"]
        self.minimum_boxes = dict.fromkeys(self.weights, 1)
        self._compared: dict[str, Tensor] = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The terms ``localization``, ``valuable_region`` and, of several classes, ``classification``."""
        ours, theirs, assignment = student.predictions, teacher.predictions, student.assignment
        if ours is None or theirs is None or assignment is None or ours.bins is None or theirs.bins is None:
            raise ValueError("Expected a student with predictions, bins and assignment, and a teacher with bins")
        labels = [target.labels for target in batch.targets]
        positive = self.classes.positives(assignment, labels).float()
        # Of a class that the teacher does not know it has no box to teach: such a box is put far from everything.
        taught = batch.boxes
        if not self.classes.complete:
            known = [self.classes.known(own).unsqueeze(1) for own in labels]
            taught = [torch.where(kept, boxes, -1e6) for kept, boxes in zip(known, batch.boxes, strict=True)]
        with full_precision(ours.logits):
            confidence = positive * at_least_float32(ours.logits.detach()).sigmoid().amax(dim=2)
            value = (assignment < 0).float() * self._value(ours.anchors.float(), taught)
        count = positive.sum()
        self._compared = {
            "localization": count,
            "valuable_region": (value > 0).sum().to(count),
            "classification": count,
        }
        main, valuable = (
            bin_divergence(
                ours.bins,
                theirs.bins,
                weight.unsqueeze(2).expand(-1, -1, 4),
                temperature=self.temperature,
                normaliser=normaliser,
            )
            for weight, normaliser in ((confidence, _MAIN), (value, _VALUABLE))
        )
        terms = {"localization": main, "valuable_region": valuable}
        if "classification" not in self.weights:
            return terms
        terms["classification"] = bin_divergence(
            self.classes.student_logits(ours.logits),
            self.classes.logits(theirs.logits),
            positive,
            temperature=self.class_temperature,
            normaliser=positive.sum().clamp_min(1.0),
        )
        return terms

    def compared_counts(self) -> dict[str, Tensor]:
        """The positives, and the predictions in the valuable region."""
        return {name: count for name, count in self._compared.items() if name in self.weights}

    def _value(self, anchors: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """(B, A), see `valuable_region`; at points the larger one of the cells' and of the squares'."""
        shapes = [anchors, _around_centres(anchors)] if self.points else [anchors]
        found = valuable_region(
            torch.cat(shapes), boxes, positive_overlap=self.positive_overlap, share=self.valuable_share
        )
        return found.unflatten(1, (len(shapes), len(anchors))).amax(dim=1)


def _around_centres(cells: Tensor) -> Tensor:
    """(A, 4) cells of one stride to squares of the authors' anchors' size around their centres."""
    centres, sides = (cells[:, :2] + cells[:, 2:]) / 2, cells[:, 2:] - cells[:, :2]
    return torch.cat([centres - _ANCHOR / 2 * sides, centres + _ANCHOR / 2 * sides], dim=1)
