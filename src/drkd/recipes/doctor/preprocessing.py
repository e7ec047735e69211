"""How good is the teacher on the user's images, and would it be better under another preprocessing?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from drkd.contracts import DetectionBatch, Detections, Detector
from drkd.data.split import DatasetSplit
from drkd.evaluation import CocoEvaluator
from drkd.recipes.doctor.finding import Finding, Severity

Change = Callable[[Tensor], Tensor]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BAD_AP, _WEAK_AP = 0.05, 0.15
_RISE, _RISE_SHARE = 0.03, 1.25


def detector_statistics(detector: Detector) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation that a detector normalises by, (3, 1, 1) each; None where it does not say."""
    transform: Any = getattr(detector.model, "transform", None)
    if transform is None or not hasattr(transform, "image_mean"):
        return None
    return torch.tensor(transform.image_mean).view(3, 1, 1), torch.tensor(transform.image_std).view(3, 1, 1)


def preprocessing_changes(teacher: Detector, student: Detector | None) -> dict[str, Change]:
    """Mistakes to try out: each turns our images into ones that the teacher then sees as it would under that mistake.

    Args:
        teacher: Normalises the images itself.
        student: Its normalisation is tried where it differs from the teacher's.
    """
    changes: dict[str, Change] = {"BGR instead of RGB": lambda images: images.flip(1)}
    own = detector_statistics(teacher)
    if own is None:
        return changes
    others = {"ImageNet's mean and std": _IMAGENET, "mean and std 0.5": _HALF}
    candidates = {
        name: (torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1))
        for name, (mean, std) in others.items()
    }
    candidates["no normalisation"] = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    candidates["0 to 255"] = (torch.zeros(3, 1, 1), torch.full((3, 1, 1), 1 / 255))
    theirs = detector_statistics(student) if student is not None else None
    if theirs is not None:
        candidates = {"the student's preprocessing": theirs, **candidates}
    seen = [own]
    for name, (mean, std) in candidates.items():
        if any(torch.allclose(mean, m) and torch.allclose(std, s) for m, s in seen):
            continue
        seen.append((mean, std))
        changes[name] = _renormalise(mean, std, *own)
    return changes


def _renormalise(mean: Tensor, std: Tensor, own_mean: Tensor, own_std: Tensor) -> Change:
    def change(images: Tensor) -> Tensor:
        m, s, own_m, own_s = (value.to(images) for value in (mean, std, own_mean, own_std))
        return (images - m) / s * own_s + own_m

    return change


@torch.no_grad()
def average_precision(
    detector: Detector,
    batches: Iterable[DetectionBatch],
    split: DatasetSplit,
    changes: Mapping[str, Change] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """COCO's AP and AP50 of a detector on some batches, which are gone through once; AP is of their images alone.

    Classes are the split's by name; detections of classes that it does not have are left out.

    Args:
        detector: In eval mode.
        batches: On its device.
        split: What the batches' images are of.
        changes: Of the images, by name.

    Returns:
        "ap" and "ap50" by change, and under "" those of the images as they are.
    """
    names = list(split.class_names)
    places = [names.index(name) if name in names else -1 for name in detector.spec.class_names]
    ids: list[int] = []
    detections: dict[str, list[Detections]] = {"": [], **{name: [] for name in changes}}
    for batch in batches:
        ids += batch.image_ids
        for name, found in detections.items():
            seen = replace(batch, images=changes[name](batch.images)) if name else batch
            found += [_in_order(entry, places) for entry in detector.detect(seen)]
    looked_at = set(ids)
    records = [record for record in split.records if record.image_id in looked_at]
    measured = {}
    for name, found in detections.items():
        evaluator = CocoEvaluator(records, split.class_names)
        evaluator.update(ids, found)
        metrics = evaluator.compute()
        measured[name] = {"ap": metrics.ap, "ap50": metrics.ap50}
    return measured


def _in_order(found: Detections, places: Sequence[int]) -> Detections:
    """In the memory of the CPU, labels as the split numbers its classes; those that it does not have are dropped."""
    labels = torch.tensor(places, dtype=torch.int64, device=found.labels.device)[found.labels]
    known = labels >= 0
    return Detections(found.boxes[known].cpu(), found.scores[known].cpu(), labels[known].cpu())


def judge_teacher(ap: float, ap50: float, images: int, *, boxes: int) -> Finding:
    """Say how good the teacher is; a bad one is the commonest cause of distillation that fails."""
    measured = f"The teacher's AP is {100 * ap:.1f} (AP50 {100 * ap50:.1f}) on {images} validation images"
    if not boxes:
        return Finding("careful", "teacher", f"The {images} validation images that were looked at show no boxes.")
    if not ap >= _BAD_AP:
        return Finding(
            "stop",
            "teacher",
            f"{measured}: it knows next to nothing of them, and a bad teacher is the commonest cause of failure. Check "
            "its checkpoint, its classes and its preprocessing.",
        )
    if ap < _WEAK_AP:
        return Finding(
            "careful", "teacher", f"{measured}: it is weak. Is it better than the student trained alone would be?"
        )
    return Finding("ok", "teacher", f"{measured}.")


def judge_preprocessing(own: float, others: dict[str, float]) -> Finding:
    """Say whether another preprocessing suits the teacher clearly better than its own.

    Args:
        own: AP as the recipe has it.
        others: AP by change.
    """
    best = max(others, key=lambda name: others[name] if others[name] == others[name] else -1.0)
    value = others[best]
    if value > own + _RISE and value > own * _RISE_SHARE:
        severity: Severity = "stop" if own < value / 2 else "careful"
        return Finding(
            severity,
            "preprocessing",
            f"With {best} the teacher's AP rises from {100 * own:.1f} to {100 * value:.1f}: it was trained with "
            "another preprocessing than it is given here. Set its builder's image_mean and image_std, where it has "
            "them, to what it was trained with, style: caffe of an MMDetection teacher, or swap the channels of its "
            "first layer.",
        )
    tried = ", ".join(f"{name} {100 * ap:.1f}" for name, ap in others.items())
    return Finding("ok", "preprocessing", f"No other preprocessing suits the teacher better ({tried}).")
