"""Start a student from its teacher's neck and head, as FGD and MGD do for one-stage detectors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from drkd.adapters.resized import ResizedDetector
from drkd.contracts import Detector, DrkdError

_SHOWN = 6
# Layers with a row for each class: of torchvision's heads, of transformers', of Ultralytics'.
_CLASS_LAYERS = re.compile(
    r"cls_logits\.|classification_head\.module_list\.|box_predictor\.|mask_fcn_logits\."
    r"|class_embed\.|enc_score_head\.|cv3\.\d+\.2\."
)


@dataclass(frozen=True)
class Inherited:
    """What became of the student's tensors outside the backbone's body, by name.

    Args:
        copied: Those that are the teacher's now.
        own: Those that are the student's own, since the teacher has none of this name and shape, or other classes.
    """

    copied: tuple[str, ...]
    own: tuple[str, ...]

    def __str__(self) -> str:
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in self.own))
        kept = f"; its own: {', '.join(layers[:_SHOWN])}" if layers else ""
        more = f" and {len(layers) - _SHOWN} more layers" if len(layers) > _SHOWN else ""
        return f"inherit: {len(self.copied)} tensors of neck and head are the teacher's{kept}{more}."


@torch.no_grad()
def inherit_neck_and_head(student: Detector, teacher: Detector, *, body: str | None = None) -> Inherited:
    """Copy into the student what the teacher has under the same name and in the same shape, the backbone's body aside.

    Lateral convolutions differ in shape where the bodies differ in width, and stay the student's own. So do the layers
    that name classes where the two do not number the same classes alike.

    Args:
        student: Changed in place.
        teacher: Not changed.
        body: Beginning of the names that are never copied; None is the detector's own, ``body_names``.

    Raises:
        DrkdError: If no tensor of the head fits, so that there would be nothing to inherit; or the classes differ in a
            detector whose layers that name classes are not known.
    """
    kept = student.body_names if body is None else (body,)
    theirs = teacher.model.state_dict()
    ours = student.model.state_dict()
    alike = _class_rows(student) == _class_rows(teacher)
    if not alike and not any(map(_CLASS_LAYERS.search, ours)):
        raise DrkdError(
            f"inherit: the student ({student.spec.family}) and the teacher do not have the same classes in the same "
            "order, and which layers of this detector name classes is not known, so that rows would be copied onto "
            "other classes. Use a teacher trained on the student's classes in their order, or leave out inherit."
        )
    fitting = {
        name: theirs[name]
        for name, value in ours.items()
        if not name.startswith(kept)
        and name in theirs
        and theirs[name].shape == value.shape
        and (alike or not _CLASS_LAYERS.search(name))
    }
    if not any(not name.startswith("backbone.") for name in fitting):
        raise DrkdError(
            f"inherit: the student ({student.spec.family}, {student.spec.levels[0].channels} channels a level) has no "
            f"part of the head in common with the teacher ({teacher.spec.family}, {teacher.spec.levels[0].channels} "
            "channels). It needs the same kind of detector, the same fpn_channels, classes and anchors."
        )
    student.model.load_state_dict(fitting, strict=False)
    own = [name for name in ours if not name.startswith(kept) and name not in fitting]
    return Inherited(tuple(sorted(fitting)), tuple(own))


def _class_rows(detector: Detector) -> dict[str, int]:
    """By class, the detector's own label of it, which is its place in the layers that name classes."""
    inner = detector.inner if isinstance(detector, ResizedDetector) else detector
    names = inner.spec.class_names
    labels = getattr(inner, "label_ids", range(len(names)))
    return {name: label for name, label in zip(names, labels, strict=True) if label >= 0}
