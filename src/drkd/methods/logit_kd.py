"""Plain distillation of predictions, the control that methods on features and heads have to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.contracts import Decay, DensePredictions, DetectionBatch, DetectorOutput, DetectorSpec, KDMethod, Want
from drkd.losses import class_divergence, offset_distance
from drkd.methods.image_share import WHOLE_RUN, ImageShare, pick_rows
from drkd.methods.prediction_pairs import (
    TeacherClasses,
    matched_regions,
    regions_of,
    require_layouts,
    require_same_grid,
)
from drkd.methods.term_weights import choose_weight


class LogitKD(KDMethod):
    """Softened classes (Hinton et al., arXiv:1503.02531) and boxes where the student's assignment finds an object.

    One-stage pairs: on the anchors or points that the student's task loss takes for positive, a KL divergence of each
    class's sigmoid (of SSDs, of the softmax with the background) and the mean absolute difference of the coded boxes.
    Two-stage pairs: on the positive ones of the regions that the student sampled for its own loss, which the teacher's
    head classifies on its own features, a KL divergence of the softmax with the background and the difference of the
    offsets for the region's class. Both terms are means over positives; without any they are exactly zero.

    Query-based heads (DETR and its kin) are not served: the queries of two models have no common order.

    The teacher's head is dear: with a ``share`` below 1 it looks at that part of a batch's images only, with a ``span``
    in that part of the run only (`ImageShare`).

    Args:
        student: The student.
        teacher: The teacher, of the same kind and anchors, with some of the student's classes, in any order.
        class_weight: Of the term ``classification``; None is 1.
        box_weight: Of the term ``box``; None is 1.
        temperature: Of the classes, > 0.
        balanced: Whether weights are gradient ratios, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.
        share: Of a batch's images that the teacher's head is asked about, in (0, 1]. One-stage teachers whose head drkd
            does not run on its own (SSD, YOLO) are asked about all.
        span: From which part of the run to which part the terms count, see `ImageShare`; asked outside too are heads
            that drkd does not run on its own.

    Raises:
        DrkdError: If the predictions of the two cannot be compared.
        ValueError: If an argument is out of range.
    """

    needs = frozenset[Want]({"features", "predictions", "assignment"})
    teacher_needs = frozenset[Want]({"predictions"})

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        class_weight: float | None = None,
        box_weight: float | None = None,
        temperature: float = 2.0,
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
        share: float = 1.0,
        span: tuple[float, float] = WHOLE_RUN,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"Expected a temperature above 0, got {temperature}")
        layout, theirs = require_layouts(
            student, teacher, method="LogitKD", kinds=("anchors", "points", "regions", "default_boxes")
        )
        self.images = ImageShare(share, with_boxes=True, span=span)
        self.softmax = layout.kind == "default_boxes"
        self.two_stage = layout.kind == "regions"
        if self.two_stage:
            self.needs = frozenset[Want]({"features", "regions"})
            self.teacher_needs = frozenset[Want]({"region_head"})
        else:
            require_same_grid(student, teacher, method="LogitKD")
            if not self.images.everything and theirs.head_depth > 0:
                self.teacher_needs = frozenset[Want]({"features", "head_tail"})
        self.classes = TeacherClasses(student, teacher, method="LogitKD")
        self.reads_boxes = not self.classes.complete  # labels, image by image
        self.temperature = temperature
        self.weights = {
            "classification": choose_weight(class_weight, balanced=balanced, plain=1.0),
            "box": choose_weight(box_weight, balanced=balanced, plain=1.0),
        }
        self.minimum_boxes = {"classification": 1, "box": 1}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self._positives: Tensor | None = None
        if "predictions" in self.teacher_needs:
            # The teacher's head has looked at all images already.
            self.images = ImageShare(1.0, with_boxes=True, span=span)
        self.needs_run_length = self.images.span != WHOLE_RUN

    def compared_counts(self) -> dict[str, Tensor]:
        """The positives, of both terms."""
        return dict.fromkeys(self.weights, self._positives) if self._positives is not None else {}

    def begin_pass(self, number: int, *, measured: bool, progress: float | None = None) -> None:
        """See `KDMethod`; without it every pass counts."""
        self.images.begin_pass(number, measured=measured, progress=progress)

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The terms ``classification`` and ``box``."""
        factor = self.images.factor(len(batch.targets))
        if factor == 0:
            zero = self._positives = torch.zeros((), device=batch.images.device)
            return {"classification": zero, "box": zero}
        rows = self.images.rows(batch.targets)
        terms = self._regions(student, teacher, rows) if self.two_stage else self._dense(student, teacher, batch, rows)
        return terms if factor == 1 else {name: factor * term for name, term in terms.items()}

    def _dense(
        self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch, rows: Sequence[int]
    ) -> dict[str, Tensor]:
        ours, assignment = student.predictions, student.assignment
        if ours is None or assignment is None:
            raise ValueError("Expected a student with predictions and assignment")
        if "head_tail" in self.teacher_needs:
            if teacher.head_tail is None:
                raise ValueError("Expected a teacher with a head_tail")
            maps = [pick_rows(level.tensor, rows) for level in teacher.features]
            theirs: DensePredictions | None = teacher.head_tail(maps, maps, after=0)
        else:
            theirs = teacher.predictions
        if theirs is None:
            raise ValueError("Expected a teacher with predictions")
        labels = [batch.targets[row].labels for row in rows]
        positive = self.classes.positives(pick_rows(assignment, rows), labels).float()
        self._positives = positive.sum()
        classes = class_divergence(
            self.classes.student_logits(pick_rows(ours.logits, rows), background=self.softmax),
            self.classes.logits(theirs.logits, background=self.softmax),
            positive,
            temperature=self.temperature,
            activation="softmax" if self.softmax else "sigmoid",
        )
        return {"classification": classes, "box": offset_distance(pick_rows(ours.boxes, rows), theirs.boxes, positive)}

    def _regions(self, student: DetectorOutput, teacher: DetectorOutput, rows: Sequence[int]) -> dict[str, Tensor]:
        if student.regions is None or student.regions.labels is None or teacher.region_head is None:
            raise ValueError("Expected a student with matched regions and a teacher with a region_head")
        # Most regions are background: only the others go through the teacher's head.
        ours, labels = matched_regions(regions_of(student.regions, rows), background=self.classes.background)
        theirs = teacher.region_head(ours.regions)
        positive = self.classes.known(labels).float()
        self._positives = positive.sum()
        own_place = labels.clamp_max(ours.boxes.shape[1] - 1)
        boxes = [
            entry.gather(1, place.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)
            for entry, place in (
                (ours.boxes, own_place),
                (self.classes.boxes(theirs.boxes), self.classes.place(labels)),
            )
        ]
        target = self.classes.logits(theirs.logits, background=True)
        logits = self.classes.student_logits(ours.logits, background=True)
        classes = class_divergence(logits, target, positive, temperature=self.temperature, activation="softmax")
        return {"classification": classes, "box": offset_distance(boxes[0], boxes[1], positive)}
