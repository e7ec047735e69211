"""Images without labels: the teacher's confident boxes stand in for the ground truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drkd.contracts import BoxTargets, DetectionBatch, Detections, Detector, DrkdError
from drkd.engine.teachers import TeacherGroup

# As for ground truth in training: a box that is thinner has no side to regress.
_MINIMUM_SIDE = 1.0


@dataclass(frozen=True)
class UnlabelledImages:
    """How images without labels train the student.

    The teacher detects on each of them as it is in the batch, augmented. Its boxes of a score of at least
    ``score_threshold`` replace the ground truth wherever the method looks at boxes. The task loss leaves these images
    out, unless ``pseudo_labels`` makes the same boxes its labels, as in pseudo-label training (Lee, ICML workshop 2013;
    for detectors STAC, Sohn et al., arXiv:2005.04757). An image on which the teacher is sure of nothing then counts as
    background.

    Args:
        pseudo_labels: Use the teacher's boxes as labels in the task loss too.
        score_threshold: Lowest score of a box that is used, in [0, 1].
        max_boxes: Most boxes an image, the best first.
    """

    pseudo_labels: bool = False
    score_threshold: float = 0.5
    max_boxes: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold <= 1:
            raise DrkdError(
                f"training.unlabelled.score_threshold: expected a score in [0, 1], got {self.score_threshold}"
            )
        if self.max_boxes < 1:
            raise DrkdError(f"training.unlabelled.max_boxes: expected at least 1, got {self.max_boxes}")


@dataclass(frozen=True)
class BatchPart:
    """Images that go through the detectors together.

    Args:
        batch: The images; those without labels have the teacher's boxes.
        counts: Whether their task loss counts.
    """

    batch: DetectionBatch
    counts: bool


def choose_labeller(teacher: Detector) -> Detector:
    """The teacher whose boxes stand in for labels: of several, the first that detects.

    Raises:
        DrkdError: If none detects.
    """
    members = teacher.members.values() if isinstance(teacher, TeacherGroup) else (teacher,)
    for member in members:
        if isinstance(member, Detector) and member.can_detect:
            return member
    raise DrkdError(
        "data.unlabelled: images without labels get the boxes that a teacher detects, and no teacher of this run "
        "detects: it was read for its features alone. Use a teacher with its heads (or wrapped with its detections), "
        "or leave out data.unlabelled."
    )


def split_batch(
    batch: DetectionBatch, *, student: Detector, teacher: Detector, settings: UnlabelledImages
) -> tuple[BatchPart, ...]:
    """Label what has no labels, and part the images by whether they count in the task loss; neither part is empty."""
    if not batch.labelled or all(batch.labelled):
        return (BatchPart(batch, True),)
    labelled = [row for row, known in enumerate(batch.labelled) if known]
    unlabelled = [row for row, known in enumerate(batch.labelled) if not known]
    shown = batch.select(unlabelled)
    targets = detect_targets(shown, student=student, teacher=teacher, settings=settings)
    if settings.pseudo_labels:
        merged = list(batch.targets)
        for row, found in zip(unlabelled, targets, strict=True):
            merged[row] = found
        return (BatchPart(replace(batch, targets=tuple(merged)), True),)
    taught = BatchPart(replace(shown, targets=targets), False)
    if labelled:
        return (BatchPart(batch.select(labelled), True), taught)
    # The only part, whose losses are asked for and multiplied by zero: a student of masks needs masks for that, any.
    covered = tuple(
        replace(target, masks=target.labels.new_zeros(1, 1, 1, dtype=torch.bool).expand(len(target.boxes), *size))
        for target, size in zip(targets, shown.sizes, strict=True)
    )
    return (replace(taught, batch=replace(shown, targets=covered)),)


@torch.no_grad()
def detect_targets(
    batch: DetectionBatch, *, student: Detector, teacher: Detector, settings: UnlabelledImages
) -> tuple[BoxTargets, ...]:
    """The teacher's confident boxes as targets, xyxy px of the batch tensor, in the student's classes.

    Costs one host-device synchronisation a batch beside those of the teacher's own ``detect``. A class that the
    student does not have is left out.

    Raises:
        DrkdError: If no teacher detects.
    """
    # As if the tensor were the stored image: the boxes then come in its px, whatever the augmentation did.
    teacher = choose_labeller(teacher)
    found = teacher.detect(replace(batch, original_sizes=batch.sizes))
    table = _class_table(student, teacher)
    picked = [_pick(entry, table, settings) for entry in found]
    counts = torch.stack([count for _, _, count in picked]).tolist()
    return tuple(
        BoxTargets(boxes[:count], labels[:count], torch.zeros_like(labels[:count], dtype=torch.bool))
        for (boxes, labels, _), count in zip(picked, counts, strict=True)
    )


def _pick(found: Detections, table: Tensor | None, settings: UnlabelledImages) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes and labels, those to keep first and by score, and how many to keep (0-d, still on the device)."""
    boxes, labels = found.boxes.float(), found.labels.to(torch.int64)
    kept = (found.scores >= settings.score_threshold) & ((boxes[:, 2:] - boxes[:, :2]) >= _MINIMUM_SIDE).all(dim=1)
    if table is not None:
        labels = table.to(labels.device)[labels]
        kept = kept & (labels >= 0)
    order = torch.where(kept, found.scores.float(), -1.0).argsort(descending=True, stable=True)
    return boxes[order], labels[order], kept.sum().clamp(max=settings.max_boxes)


def _class_table(student: Detector, teacher: Detector) -> Tensor | None:
    """The student's label of each of the teacher's, -1 where it has none; None where the two are alike."""
    ours, theirs = student.spec.class_names, teacher.spec.class_names
    if ours == theirs:
        return None
    return torch.tensor([ours.index(name) if name in ours else -1 for name in theirs], dtype=torch.int64)
