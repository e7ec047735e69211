"""Whether the predictions of a student and a teacher can be compared, and in which order of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drkd.contracts import DetectorSpec, NotApplicableError, PredictionKind, PredictionLayout, RegionPredictions

_NAMED = 5
_WORDS = {
    "anchors": "class sigmoids and box offsets on anchors (RetinaNet)",
    "default_boxes": "a class softmax and box offsets on default boxes (SSD)",
    "points": "class sigmoids and box distances on points (FCOS, YOLO)",
    "regions": "a class softmax on proposed regions (Faster R-CNN)",
}
ON_FEATURES = "a method on features, such as DRKD or PKD"


def require_layouts(
    student: DetectorSpec, teacher: DetectorSpec, *, method: str, kinds: Sequence[PredictionKind]
) -> tuple[PredictionLayout, PredictionLayout]:
    """The layouts of both, which must be of one of these kinds, and of the same.

    Raises:
        NotApplicableError: If they are not.
    """
    ours, theirs = student.predictions, teacher.predictions
    if ours is None or theirs is None or ours.kind != theirs.kind or ours.kind not in kinds:
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise NotApplicableError(
            f"{method} compares predictions and expects a student and a teacher that both predict {expected}. "
            f"Got a student ({_family(student)}) with {_describe(ours)} and a teacher ({_family(teacher)}) with "
            f"{_describe(theirs)}. Choose detectors of one kind, or {ON_FEATURES}."
        )
    return ours, theirs


def require_same_grid(student: DetectorSpec, teacher: DetectorSpec, *, method: str) -> None:
    """Both must predict at the same strides, for the same anchors.

    Raises:
        NotApplicableError: If they do not.
    """
    strides = [[level.stride for level in spec.levels] for spec in (student, teacher)]
    if len(strides[0]) != len(strides[1]) or any(abs(math.log2(a / b)) > 0.01 for a, b in zip(*strides, strict=True)):
        raise NotApplicableError(
            f"{method} compares predictions place by place and expects pyramids of the same strides, got "
            f"{_numbers(strides[0])} px (student) and {_numbers(strides[1])} px (teacher). "
            f"Build the student with the teacher's stages and extra levels, or use {ON_FEATURES}."
        )
    offsets = [spec.predictions.centre_offset if spec.predictions is not None else 0.0 for spec in (student, teacher)]
    if offsets[0] != offsets[1]:
        raise NotApplicableError(
            f"{method} compares predictions place by place and expects them in the same part of a cell, got centres at "
            f"{offsets[0]:g} of a cell (student: {_family(student)}) and at {offsets[1]:g} (teacher: "
            f"{_family(teacher)}); torchvision's lie at 0, YOLO's at 0.5. Choose detectors of one "
            f"kind, or {ON_FEATURES}."
        )
    anchors = [spec.predictions.anchors if spec.predictions is not None else () for spec in (student, teacher)]
    for level, ours, theirs in zip(student.levels, *anchors, strict=True):
        if len(ours) != len(theirs):
            raise NotApplicableError(
                f"{method} compares predictions anchor by anchor and expects as many anchors a cell, got {len(ours)} "
                f"(student) and {len(theirs)} (teacher) on level {level.name}. Give both the same anchor_sizes and "
                f"anchor_ratios, or use {ON_FEATURES}."
            )
        if any(
            abs(a - b) > 0.01 * a for one, two in zip(ours, theirs, strict=True) for a, b in zip(one, two, strict=True)
        ):
            raise NotApplicableError(
                f"{method} compares boxes as they are coded from anchors and expects equal anchors, got sides of "
                f"{_sides(ours)} px (student) and {_sides(theirs)} px (teacher) on level {level.name}. Give both the "
                f"same anchor_sizes and anchor_ratios, or use {ON_FEATURES}."
            )


def regions_of(found: RegionPredictions, rows: Sequence[int]) -> RegionPredictions:
    """The regions of these images; the other images are left with none.

    Args:
        found: Of a student, with labels.
        rows: Places of the images, in order.
    """
    if len(rows) == len(found.regions):
        return found
    counts, chosen = [len(entry) for entry in found.regions], {*rows}

    def pick(values: Tensor) -> Tensor:
        return torch.cat([part for row, part in enumerate(values.split(counts)) if row in chosen])

    return RegionPredictions(
        tuple(entry if row in chosen else entry[:0] for row, entry in enumerate(found.regions)),
        pick(found.logits),
        pick(found.boxes),
        None if found.labels is None else pick(found.labels),
        found.matched_at_most,
    )


def matched_regions(found: RegionPredictions, *, background: int) -> tuple[RegionPredictions, Tensor]:
    """The regions that are matched with a box, filled up with others to a number that no device is asked for.

    Args:
        found: Of a student, with labels: R regions in all.
        background: The label of a region without a box.

    Returns:
        ``matched_at_most`` regions of each image, or all where there are fewer or no bound is known, and their labels
        (R',) int64.

    Raises:
        ValueError: If the regions were not matched.
    """
    if found.labels is None:
        raise ValueError("Expected regions with labels, got none")
    counts, most = [len(entry) for entry in found.regions], found.matched_at_most
    if most is None or max(counts, default=0) <= most:
        return found, found.labels
    matched = (found.labels != background).to(torch.uint8)
    kept = [own.topk(min(most, len(own))).indices for own in matched.split(counts)]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    every = torch.cat([own + start for own, start in zip(kept, starts, strict=True)])
    labels = found.labels[every]
    regions = tuple(entry[own] for entry, own in zip(found.regions, kept, strict=True))
    return RegionPredictions(regions, found.logits[every], found.boxes[every], labels, most), labels


class TeacherClasses(nn.Module):
    """The predictions of both for the classes that they share, in the student's order.

    Classes are matched by name (a recipe's class map renames the teacher's); classes that only one of the two has are
    left out, and boxes of a class that the teacher does not know are no positives.

    Args:
        student: The student's classes.
        teacher: The teacher's.
        method: For the message.

    Raises:
        NotApplicableError: If the two share no class, or the student's head has no output for one of its classes.
    """

    _order: Tensor
    _kept: Tensor
    _known: Tensor

    def __init__(self, student: DetectorSpec, teacher: DetectorSpec, *, method: str) -> None:
        super().__init__()
        dead = _missing(student)
        if dead:
            raise NotApplicableError(
                f"{method} compares class scores and expects a student with an output for each of its classes, got "
                f"none for {_list(dead)}. Give the student a new head for your classes."
            )
        lacking = {*_missing(teacher)}
        shared = [name for name in student.class_names if name in teacher.class_names and name not in lacking]
        if not shared:
            raise NotApplicableError(
                f"{method} compares class scores and expects a teacher that predicts some of the student's "
                f"{student.num_classes} classes ({_list(student.class_names)}), got none of them (the teacher's: "
                f"{_list([name for name in teacher.class_names if name not in lacking])}). Join the classes by a class "
                f"map, train the teacher on the student's classes, or use {ON_FEATURES}."
            )
        self.names = tuple(shared)
        self.count = len(shared)
        places = [teacher.class_names.index(name) for name in shared]
        self.as_it_is = places == list(range(teacher.num_classes))
        self.complete = self.count == student.num_classes
        self.background = student.num_classes
        kept = [student.class_names.index(name) for name in shared]
        known = [name in shared for name in student.class_names]
        self.register_buffer("_order", torch.tensor([*places, teacher.num_classes]), persistent=False)
        self.register_buffer("_kept", torch.tensor([*kept, student.num_classes]), persistent=False)
        # The last is the background.
        self.register_buffer("_known", torch.tensor([*known, False]), persistent=False)

    def logits(self, values: Tensor, *, background: bool = False) -> Tensor:
        """The teacher's (..., K) to the shared classes, each with the background last where there is one."""
        order = self._order if background else self._order[: self.count]
        return values if self.as_it_is else values.index_select(values.ndim - 1, order)

    def student_logits(self, values: Tensor, *, background: bool = False) -> Tensor:
        """The same of the student's."""
        kept = self._kept if background else self._kept[: self.count]
        return values if self.complete else values.index_select(values.ndim - 1, kept)

    def boxes(self, values: Tensor) -> Tensor:
        """The teacher's (R, K, 4) to (R, shared classes, 4)."""
        return values if self.as_it_is else values.index_select(1, self._order[: self.count])

    def place(self, labels: Tensor) -> Tensor:
        """Among the shared classes, the place of labels (R,) of the student's; 0 for those that are not shared."""
        if self.complete:
            return labels.clamp_max(self.count - 1)
        return (self._kept[: self.count] == labels.unsqueeze(1)).int().argmax(dim=1)

    def known(self, labels: Tensor) -> Tensor:
        """Which labels of the student's are of a shared class; the background, K, is none."""
        return self._known[labels]

    def positives(self, assignment: Tensor, labels: Sequence[Tensor]) -> Tensor:
        """(B, A) bool: predictions that are matched with a box of a shared class.

        Args:
            assignment: (B, A) int64, see `DetectorOutput`.
            labels: (N,) of each image's boxes.
        """
        positive = assignment >= 0
        if self.complete:
            return positive
        # A last entry for images without boxes, which nothing is matched with.
        known = [torch.cat([self.known(own), positive.new_zeros(1)]) for own in labels]
        rows = [own[row.clamp(0, len(own) - 1)] for own, row in zip(known, assignment, strict=True)]
        return positive & torch.stack(rows)


def _missing(spec: DetectorSpec) -> list[str]:
    return list(spec.predictions.missing_classes) if spec.predictions is not None else []


def _list(names: Sequence[str]) -> str:
    return (", ".join(names[:_NAMED]) or "none") + (", ..." if len(names) > _NAMED else "")


def _describe(layout: PredictionLayout | None) -> str:
    return "no predictions that drkd can read" if layout is None else _WORDS[layout.kind]


def _family(spec: DetectorSpec) -> str:
    return spec.family or "of unknown family"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _sides(anchors: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{width:g} x {height:g}" for width, height in anchors[:_NAMED])
