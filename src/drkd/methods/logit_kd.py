"""Plain distillation of predictions, the control that methods on features and heads have to beat."""

from __future__ import annotations

from torch import Tensor

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, KDMethod, Want
from drkd.losses import class_divergence, offset_distance
from drkd.methods.prediction_pairs import TeacherClasses, matched_regions, require_layouts, require_same_grid
from drkd.methods.term_weights import choose_weight


class LogitKD(KDMethod):
    """Softened classes (Hinton et al., arXiv:1503.02531) and boxes where the student's assignment finds an object.

    One-stage pairs: on the anchors or points that the student's task loss takes for positive, a KL divergence of each
    class's sigmoid (of SSDs, of the softmax with the background) and the mean absolute difference of the coded boxes.
    Two-stage pairs: on the positive ones of the regions that the student sampled for its own loss, which the teacher's
    head classifies on its own features, a KL divergence of the softmax with the background and the difference of the
    offsets for the region's class. Both terms are means over positives; without any they are exactly zero.

    Args:
        student: The student.
        teacher: The teacher, of the same kind and anchors, with some of the student's classes, in any order.
        class_weight: Of the term ``classification``; None is 1.
        box_weight: Of the term ``box``; None is 1.
        temperature: Of the classes, > 0.
        balanced: Whether weights are gradient ratios, see `KDMethod`.
        warmup_steps: See `KDMethod`.

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
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"Expected a temperature above 0, got {temperature}")
        layout, _ = require_layouts(
            student, teacher, method="LogitKD", kinds=("anchors", "points", "regions", "default_boxes")
        )
        self.softmax = layout.kind == "default_boxes"
        self.two_stage = layout.kind == "regions"
        if self.two_stage:
            self.needs = frozenset[Want]({"features", "regions"})
            self.teacher_needs = frozenset[Want]({"region_head"})
        else:
            require_same_grid(student, teacher, method="LogitKD")
        self.classes = TeacherClasses(student, teacher, method="LogitKD")
        self.temperature = temperature
        self.weights = {
            "classification": choose_weight(class_weight, balanced=balanced, plain=1.0),
            "box": choose_weight(box_weight, balanced=balanced, plain=1.0),
        }
        self.minimum_boxes = {"classification": 1, "box": 1}
        self.balanced = balanced
        self.warmup_steps = warmup_steps

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The terms ``classification`` and ``box``."""
        return self._regions(student, teacher) if self.two_stage else self._dense(student, teacher, batch)

    def _dense(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        ours, theirs, assignment = student.predictions, teacher.predictions, student.assignment
        if ours is None or theirs is None or assignment is None:
            raise ValueError("Expected a student with predictions and assignment, and a teacher with predictions")
        positive = self.classes.positives(assignment, [target.labels for target in batch.targets]).float()
        classes = class_divergence(
            self.classes.student_logits(ours.logits, background=self.softmax),
            self.classes.logits(theirs.logits, background=self.softmax),
            positive,
            temperature=self.temperature,
            activation="softmax" if self.softmax else "sigmoid",
        )
        return {"classification": classes, "box": offset_distance(ours.boxes, theirs.boxes, positive)}

    def _regions(self, student: DetectorOutput, teacher: DetectorOutput) -> dict[str, Tensor]:
        if student.regions is None or student.regions.labels is None or teacher.region_head is None:
            raise ValueError("Expected a student with matched regions and a teacher with a region_head")
        # The teacher's head is dear, and most regions are background: only the others go through it.
        ours, labels = matched_regions(student.regions, background=self.classes.background)
        theirs = teacher.region_head(ours.regions)
        positive = self.classes.known(labels).float()
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
