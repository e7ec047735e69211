"""Whether the predictions of a student and a teacher can be compared, and in which order of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.contracts import DetectorSpec, DrkdError, PredictionKind, PredictionLayout

_NAMED = 5
_WORDS = {
    "anchors": "class sigmoids and box offsets on anchors (RetinaNet)",
    "points": "class sigmoids and box distances on points (FCOS, YOLO)",
    "regions": "a class softmax on proposed regions (Faster R-CNN)",
}
ON_FEATURES = "a method on features, such as DRKD or FeatureHint"


def require_layouts(
    student: DetectorSpec, teacher: DetectorSpec, *, method: str, kinds: Sequence[PredictionKind]
) -> tuple[PredictionLayout, PredictionLayout]:
    """The layouts of both, which must be of one of these kinds, and of the same.

    Raises:
        DrkdError: If they are not.
    """
    ours, theirs = student.predictions, teacher.predictions
    if ours is None or theirs is None or ours.kind != theirs.kind or ours.kind not in kinds:
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise DrkdError(
            f"{method} compares predictions and expects a student and a teacher that both predict {expected}. "
            f"Got a student ({_family(student)}) with {_describe(ours)} and a teacher ({_family(teacher)}) with "
            f"{_describe(theirs)}. Choose detectors of one kind, or {ON_FEATURES}."
        )
    return ours, theirs


def require_same_grid(student: DetectorSpec, teacher: DetectorSpec, *, method: str) -> None:
    """Both must predict at the same strides, for the same anchors.

    Raises:
        DrkdError: If they do not.
    """
    strides = [[level.stride for level in spec.levels] for spec in (student, teacher)]
    if len(strides[0]) != len(strides[1]) or any(abs(math.log2(a / b)) > 0.01 for a, b in zip(*strides, strict=True)):
        raise DrkdError(
            f"{method} compares predictions place by place and expects pyramids of the same strides, got "
            f"{_numbers(strides[0])} px (student) and {_numbers(strides[1])} px (teacher). "
            f"Build the student with the teacher's stages and extra levels, or use {ON_FEATURES}."
        )
    offsets = [spec.predictions.centre_offset if spec.predictions is not None else 0.0 for spec in (student, teacher)]
    if offsets[0] != offsets[1]:
        raise DrkdError(
            f"{method} compares predictions place by place and expects them in the same part of a cell, got centres at "
            f"{offsets[0]:g} of a cell (student: {_family(student)}) and at {offsets[1]:g} (teacher: "
            f"{_family(teacher)}); torchvision's lie at 0, YOLO's at 0.5. Choose detectors of one "
            f"kind, or {ON_FEATURES}."
        )
    anchors = [spec.predictions.anchors if spec.predictions is not None else () for spec in (student, teacher)]
    for level, ours, theirs in zip(student.levels, *anchors, strict=True):
        if len(ours) != len(theirs):
            raise DrkdError(
                f"{method} compares predictions anchor by anchor and expects as many anchors a cell, got {len(ours)} "
                f"(student) and {len(theirs)} (teacher) on level {level.name}. Give both the same anchor_sizes and "
                f"anchor_ratios, or use {ON_FEATURES}."
            )
        if any(
            abs(a - b) > 0.01 * a for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)
        ):
            raise DrkdError(
                f"{method} compares boxes as they are coded from anchors and expects equal anchors, got sides of "
                f"{_sides(ours)} px (student) and {_sides(theirs)} px (teacher) on level {level.name}. Give both the "
                f"same anchor_sizes and anchor_ratios, or use {ON_FEATURES}."
            )


class TeacherClasses(nn.Module):
    """The teacher's predictions for the student's classes, in the student's order.

    Classes are matched by name; classes that only the teacher has are left out.

    Args:
        student: The student's classes.
        teacher: The teacher's.
        method: For the message.

    Raises:
        DrkdError: If the teacher lacks a class of the student's, or either head has no output for one.
    """

    _order: Tensor

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, *, method: str) -> None:
        super().__init__()
        missing = [
            name
            for spec in (student, teacher)
            for name in (spec.predictions.missing_classes if spec.predictions is not None else ())
            if name in student.class_names
        ]
        missing += [name for name in student.class_names if name not in teacher.class_names]
        if missing:
            raise DrkdError(
                f"{method} compares class scores and expects a teacher that predicts each of the student's "
                f"{student.num_classes} classes, got none for {', '.join(missing[:_NAMED])}"
                f"{', ...' if len(missing) > _NAMED else ''} (the teacher's: {', '.join(teacher.class_names[:_NAMED])}"
                f"{', ...' if teacher.num_classes > _NAMED else ''}). Train the teacher on the student's classes, or "
                f"use {ON_FEATURES}."
            )
        places = [teacher.class_names.index(name) for name in student.class_names]
        self.count = len(places)
        self.as_it_is = places == list(range(teacher.num_classes))
        order = torch.tensor([*places, teacher.num_classes])
        self.register_buffer("_order", order, persistent=False)

    def logits(self, values: Tensor, *, background: bool = False) -> Tensor:
        """(..., K of the teacher) to (..., K of the student), each with the background last where there is one."""
        order = self._order if background else self._order[: self.count]
        return values if self.as_it_is else values.index_select(values.ndim - 1, order)

    def boxes(self, values: Tensor) -> Tensor:
        """(R, K of the teacher, 4) to (R, K of the student, 4)."""
        return values if self.as_it_is else values.index_select(1, self._order[: self.count])


def _describe(layout: PredictionLayout | None) -> str:
    return "no predictions that drkd can read" if layout is None else _WORDS[layout.kind]


def _family(spec: DetectorSpec) -> str:
    return spec.family or "of unknown family"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _sides(anchors: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{width:g} x {height:g}" for width, height in anchors[:_NAMED])
