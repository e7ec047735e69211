"""Start a student from its teacher's neck and head, as FGD and MGD do for one-stage detectors."""

from __future__ import annotations

import torch

from drkd.contracts import Detector, DrkdError


@torch.no_grad()
def inherit_neck_and_head(student: Detector, teacher: Detector, *, body: str | None = None) -> list[str]:
    """Copy into the student what the teacher has under the same name and in the same shape, the backbone's body aside.

    Lateral convolutions differ in shape where the bodies differ in width, and stay the student's own.

    Args:
        student: Changed in place.
        teacher: Not changed.
        body: Beginning of the names that are never copied; None is the detector's own, ``body_names``.

    Returns:
        Names of the copied tensors.

    Raises:
        DrkdError: If no tensor of the head fits, so that there would be nothing to inherit.
    """
    kept = student.body_names if body is None else (body,)
    theirs = teacher.model.state_dict()
    ours = student.model.state_dict()
    fitting = {
        name: theirs[name]
        for name, value in ours.items()
        if not name.startswith(kept) and name in theirs and theirs[name].shape == value.shape
    }
    if not any(not name.startswith("backbone.") for name in fitting):
        raise DrkdError(
            f"inherit: the student ({student.spec.family}, {student.spec.levels[0].channels} channels a level) has no "
            f"part of the head in common with the teacher ({teacher.spec.family}, {teacher.spec.levels[0].channels} "
            "channels). It needs the same kind of detector, the same fpn_channels, classes and anchors."
        )
    student.model.load_state_dict(fitting, strict=False)
    return sorted(fitting)
