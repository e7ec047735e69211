"""CrossKD: the student's head features go through the end of the teacher's head, whose predictions are the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.contracts import (
    Decay,
    DensePredictions,
    DetectionBatch,
    DetectorOutput,
    DetectorSpec,
    DrkdError,
    HeadFeatures,
    HeadTail,
    KDMethod,
    NotApplicableError,
    Want,
)
from drkd.losses import align_scale, decode_distances, decode_offsets, overlap_distance, quality_focal_distance
from drkd.losses.distance import at_least_float32, full_precision
from drkd.methods.image_share import WHOLE_RUN, ImageShare, pick_rows
from drkd.methods.prediction_pairs import ON_FEATURES, TeacherClasses, require_layouts, require_same_grid
from drkd.methods.term_weights import choose_weight

# After which convolution, and the plain weights of classes and boxes: the authors'.
_DEFAULTS = {"anchors": (3, 1.0, 1.0), "points": (2, 0.4, 0.75)}


class CrossKD(KDMethod):
    """Cross-head distillation (CrossKD, Wang et al., CVPR 2024, arXiv:2306.11369), for RetinaNet and FCOS pairs.

    The student's own predictions learn from the boxes alone; what imitates the teacher is what the teacher's frozen
    head makes of the student's features (see `quality_focal_distance` and `overlap_distance`). Anchors that the
    student's assignment ignores count for nothing; both terms are divided by the number of its positives.

    In training on several devices that number is its mean over the processes, as the authors'.

    Deviations: that number is at least 1 (a batch without positives would be divided by 1e-7); the statistics of
    ``align`` are constants; maps are aligned as they are after the activation, and then not left below what that gives
    (0 after a ReLU), which the rest of a head never meets; FCOS's boxes follow RetinaNet's equations, and its
    centerness is left alone.

    Args:
        student: The student; its head must be as wide as the teacher's.
        teacher: The teacher, of the same kind and anchors, with some of the student's classes, in any order.
        class_weight: Of the term ``classification``; None is 1 where balanced, else the authors'.
        box_weight: Of the term ``box``; same.
        after: Convolutions of the student's head that come before the teacher's; None is the authors' (RetinaNet 3,
            FCOS 2).
        beta: Focusing of the classes, see `quality_focal_distance`.
        align: Give the student's maps the scale of the teacher's first, see `align_scale`.
        share: Of a batch's images that the teacher's head is asked about, see `ImageShare`; those without boxes too,
            since background teaches as well.
        span: From which part of the run to which part the teacher's head is asked at all, such as (0.5, 0.75); see
            `ImageShare`.
        balanced: Whether weights are gradient ratios, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the two heads do not fit together.
        ValueError: If an argument is out of range.
    """

    needs = frozenset[Want]({"features", "head_features", "assignment"})
    teacher_needs = frozenset[Want]({"predictions", "head_tail"})

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        class_weight: float | None = None,
        box_weight: float | None = None,
        after: int | None = None,
        beta: float = 1.0,
        align: bool = True,
        share: float = 1.0,
        span: tuple[float, float] = WHOLE_RUN,
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
    ) -> None:
        super().__init__()
        ours, theirs = require_layouts(student, teacher, method="CrossKD", kinds=("anchors", "points"))
        depth, plain_class, plain_box = _DEFAULTS[ours.kind]
        self.after = depth if after is None else after
        if self.after < 1 or not (beta == 0 or beta >= 1):
            raise ValueError(f"Expected after >= 1 and a beta of 0 or at least 1, got {self.after} and {beta}")
        if not ours.head_channels or ours.head_channels != theirs.head_channels:
            raise NotApplicableError(
                "CrossKD passes the student's head features through the teacher's head and expects heads of the same "
                f"width, got {ours.head_channels} channels (student) and {theirs.head_channels} (teacher; 0 is a head "
                f"of another build than torchvision's). Build the student with fpn_channels: {theirs.head_channels}, "
                f"or use {ON_FEATURES}, or LogitKD."
            )
        if self.after > min(ours.head_depth, theirs.head_depth):
            # The authors' own place is not the user's fault: such a pair it is not for.
            kind = NotApplicableError if after is None else DrkdError
            raise kind(
                f"CrossKD was asked to cut the heads after convolution {self.after} and expects that many in both, got "
                f"{ours.head_depth} (student) and {theirs.head_depth} (teacher). Lower `after` of CrossKD, or use "
                f"{ON_FEATURES}."
            )
        require_same_grid(student, teacher, method="CrossKD")
        self.classes = TeacherClasses(student, teacher, method="CrossKD")
        self.reads_boxes = not self.classes.complete  # labels, image by image
        self.decode = decode_offsets if ours.kind == "anchors" else decode_distances
        self.beta = beta
        self.align = align
        self.images = ImageShare(share, with_boxes=False, span=span)
        self.needs_run_length = self.images.span != WHOLE_RUN
        if not self.images.everything:
            # The head is run here, on some of the images or at some of the steps.
            self.teacher_needs = frozenset[Want]({"features", "head_tail"})
        elif align:
            self.teacher_needs = self.teacher_needs | {"head_features"}
        self.weights = {
            "classification": choose_weight(class_weight, balanced=balanced, plain=plain_class),
            "box": choose_weight(box_weight, balanced=balanced, plain=plain_box),
        }
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        self._positives: Tensor | None = None

    def shared_counts(self) -> dict[str, Tensor]:
        """The positives, for both terms."""
        return {} if self._positives is None else dict.fromkeys(("classification", "box"), self._positives)

    def begin_pass(self, number: int, *, measured: bool, progress: float | None = None) -> None:
        """See `KDMethod`."""
        self.images.begin_pass(number, measured=measured, progress=progress)

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """The terms ``classification`` and ``box``."""
        tail, inside, assignment = teacher.head_tail, student.head_features, student.assignment
        if tail is None or inside is None or assignment is None:
            raise ValueError("Expected a student with head_features and its assignment, a teacher with its head_tail")
        factor = self.images.factor(len(batch.targets))
        if factor == 0:
            zero = torch.zeros((), device=batch.images.device)
            # Of no image: the mean over the processes is one of those that had some.
            self._positives = zero
            return {"classification": zero, "box": zero}
        rows = self.images.rows(batch.targets)
        target, towers = self._target(teacher, tail, rows)
        found = tail(*self._maps(inside, towers, rows), after=self.after)
        assignment = pick_rows(assignment, rows)
        if found.boxes.shape != target.boxes.shape or found.boxes.shape[:2] != assignment.shape:
            raise ValueError(
                f"Expected as many predictions of student and teacher, got {tuple(found.boxes.shape)}, "
                f"{tuple(target.boxes.shape)} and an assignment of {tuple(assignment.shape)}"
            )
        positive = self.classes.positives(assignment, [batch.targets[row].labels for row in rows])
        counted = (assignment != -2).float()
        # Of a box whose class the teacher does not know, it has no box to teach.
        taught = (positive | (assignment == -1)).float()
        self._positives = positive.sum()
        normaliser = self._positives.clamp_min(1)
        logits = [self.classes.logits(entry.logits) for entry in (found, target)]
        with full_precision(target.boxes):
            confidence = at_least_float32(logits[1].detach()).sigmoid().amax(dim=2)
            anchors = at_least_float32(target.anchors)
            boxes = [self.decode(at_least_float32(entry.boxes), anchors) for entry in (found, target)]
        terms = {
            "classification": quality_focal_distance(
                logits[0], logits[1], counted, normaliser=normaliser, beta=self.beta
            ),
            "box": overlap_distance(boxes[0], boxes[1], taught * confidence, normaliser=normaliser),
        }
        return terms if factor == 1 else {name: factor * term for name, term in terms.items()}

    def _target(
        self, teacher: DetectorOutput, tail: HeadTail, rows: Sequence[int]
    ) -> tuple[DensePredictions, HeadFeatures | None]:
        """What the teacher predicts for these images, and what its head computes on the way."""
        if self.images.everything:
            if teacher.predictions is None:
                raise ValueError("Expected a teacher with predictions")
            return teacher.predictions, teacher.head_features
        towers = tail.climb([pick_rows(level.tensor, rows) for level in teacher.features])
        ends = towers.classification[-1], towers.regression[-1]
        return tail(*ends, after=len(towers.classification)), towers

    def _maps(
        self, student: HeadFeatures, teacher: HeadFeatures | None, rows: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The student's maps of both branches, at the teacher's scale where that is wanted."""
        if self.align and teacher is None:
            raise ValueError("Expected head_features of the teacher where scales are aligned")
        place = self.after - 1
        ours = [[pick_rows(entry, rows) for entry in branch[place]] for branch in _branches(student)]
        if teacher is not None and self.align:
            theirs = [branch[place] for branch in _branches(teacher)]
            ours = [
                [_align(one, two) for one, two in zip(own, other, strict=True)]
                for own, other in zip(ours, theirs, strict=True)
            ]
        return ours[0], ours[1]


def _align(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map at the scale of the teacher's, without values that the teacher's activation cannot give."""
    lowest = teacher.detach().amin().clamp_max(0.0)
    return torch.maximum(align_scale(student, teacher).to(teacher.dtype), lowest)


def _branches(inside: HeadFeatures) -> tuple[tuple[tuple[Tensor, ...], ...], ...]:
    return inside.classification, inside.regression
