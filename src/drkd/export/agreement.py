"""Do two runs of one detector find the same? Detection by detection, with the worst case named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor
from torchvision.ops import box_iou

from drkd.contracts import Detections

BOX_BOUND_PX, SCORE_BOUND = 0.5, 1e-3
"""Largest difference of a side of a box, px of the original image, and of a score."""

_TIE_IOU = 0.01
_TIE_SHARE = 0.05


@dataclass
class Agreement:
    """How far the detections of two runs agree.

    Attributes:
        images: Images compared.
        detections: Detections of the reference.
        matched: Those with a partner: same label, box and score within the bounds.
        ties: Detections of either side without a partner where rounding may decide: the score lies within the bound of
            the threshold or of the last place, or the overlap with a better box within 0.01 of the limit.
        worst_box_px: Largest difference among partners, px.
        worst_score: The same for scores.
        missed: Detections of the reference without a partner and without such an excuse: score, distance from the
            nearest of the other, px, and words.
        extra: The same of the other.
    """

    images: int = 0
    detections: int = 0
    matched: int = 0
    ties: int = 0
    worst_box_px: float = 0.0
    worst_score: float = 0.0
    missed: list[tuple[float, float, str]] = field(default_factory=list)
    extra: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def mismatches(self) -> list[str]:
        """Both sides' in words, the worst first: of the highest score, to two places, and the farthest of those."""
        found = sorted((*self.missed, *self.extra), key=lambda one: (-round(one[0], 2), -one[1]))
        return [words for _, _, words in found]

    @property
    def good(self) -> bool:
        """Whether there was something to compare and all of it agrees."""
        return self.matched > 0 and not self.mismatches and not self.too_many_ties

    @property
    def too_many_ties(self) -> bool:
        """Whether rounding would have to decide more than a few detections, so that agreement would mean little."""
        return self.ties > max(2.0, _TIE_SHARE * self.detections)

    def as_json(self) -> dict[str, Any]:
        """Plain values, the bounds among them."""
        return {
            **asdict(self),
            "missed": len(self.missed),
            "extra": len(self.extra),
            "mismatches": self.mismatches[:10],
            "bounds": {"box_px": BOX_BOUND_PX, "score": SCORE_BOUND, "labels": "equal"},
        }


def compare(
    agreement: Agreement,
    reference: Detections,
    found: Detections,
    *,
    name: str,
    class_names: Sequence[str],
    score_threshold: float,
    nms_threshold: float,
    most: int,
) -> None:
    """Add one image to the agreement.

    Args:
        agreement: Is changed.
        reference: What PyTorch finds.
        found: What the other finds.
        name: The image's, for messages.
        class_names: For messages.
        score_threshold: Of the detector.
        nms_threshold: Of the detector.
        most: Detections an image, of the detector.
    """
    agreement.images += 1
    agreement.detections += len(reference.scores)
    free = set(range(len(found.scores)))
    lonely = []
    for index in range(len(reference.scores)):
        partner = _partner(reference, index, found, free)
        if partner is None:
            lonely.append(index)
            continue
        free.discard(partner)
        agreement.matched += 1
        box = float((reference.boxes[index] - found.boxes[partner]).abs().max())
        score = float((reference.scores[index] - found.scores[partner]).abs())
        agreement.worst_box_px = max(agreement.worst_box_px, box)
        agreement.worst_score = max(agreement.worst_score, score)
    limits = (score_threshold, nms_threshold, most)
    sides = (
        ("PyTorch", reference, found, lonely, agreement.missed),
        ("ONNX", found, reference, sorted(free), agreement.extra),
    )
    for who, own, other, places, kept in sides:
        for index in places:
            if _is_tie(own, other, index, *limits):
                agreement.ties += 1
            else:
                kept.append(_describe(who, own, other, index, name, class_names))


def _partner(reference: Detections, index: int, found: Detections, free: set[int]) -> int | None:
    options = [
        (float((reference.boxes[index] - found.boxes[place]).abs().max()), place)
        for place in free
        if int(found.labels[place]) == int(reference.labels[index])
        and float((reference.scores[index] - found.scores[place]).abs()) <= SCORE_BOUND
    ]
    best = min(options, default=None)
    return best[1] if best is not None and best[0] <= BOX_BOUND_PX else None


def _is_tie(own: Detections, other: Detections, index: int, score: float, iou: float, most: int) -> bool:
    value = float(own.scores[index])
    if value - score <= SCORE_BOUND:
        return True
    if max(len(own.scores), len(other.scores)) >= most and value - float(own.scores[-1]) <= SCORE_BOUND:
        return True
    better = (other.labels == own.labels[index]) & (other.scores >= value - SCORE_BOUND)
    overlaps: Tensor = box_iou(own.boxes[index : index + 1], other.boxes[better])
    return bool(((overlaps - iou).abs() <= _TIE_IOU).any())


def _describe(
    who: str, own: Detections, other: Detections, index: int, name: str, class_names: Sequence[str]
) -> tuple[float, float, str]:
    box = [round(float(side), 2) for side in own.boxes[index]]
    label, score = int(own.labels[index]), float(own.scores[index])
    text = f"{name}: only {who} finds '{class_names[label]}' at {box} with score {score:.4f}"
    if not len(other.scores):
        return score, float("inf"), f"{text}; the other finds nothing"
    overlaps = box_iou(own.boxes[index : index + 1], other.boxes)[0]
    near = int(overlaps.argmax())
    shift = float((own.boxes[index] - other.boxes[near]).abs().max())
    return (
        score,
        shift,
        f"{text}; nearest is '{class_names[int(other.labels[near])]}', {shift:.2f} px away, with score "
        f"{float(other.scores[near]):.4f}",
    )
