"""Instance distillation: the pooled features of the same boxes are compared."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from drkd.losses.alignment import AdapterInit, adapt, check_maps, make_adapter
from drkd.losses.distance import at_least_float32, full_precision, tensor_distance
from drkd.losses.instances import InstanceLayout

InstanceDistance = Literal["frobenius", "norm", "relative", "mse", "standardised"]
"""How pooled instances are compared; see `instance_distance`."""


def instance_distance(student: Tensor, teacher: Tensor, layout: InstanceLayout, *, kind: InstanceDistance) -> Tensor:
    r"""Compare pooled instances.

    - ``frobenius``: un-squared norm of an image's instances together, summed over images (the released code).
    - ``norm``: mean over the instances of the un-squared norm of each (the paper's equation).
    - ``relative``, ``mse``, ``standardised``: of all instances of the batch together, see `tensor_distance`.

    Args:
        student: (sum N, C, r, r).
        teacher: Same shape.
        layout: Of the images.
        kind: See above.

    Returns:
        0-d, at least float32; 0 with a graph where there is no instance.
    """
    if kind in ("relative", "mse", "standardised"):
        return tensor_distance(student, teacher, kind=kind)
    if student.shape != teacher.shape:
        raise ValueError(f"Expected instances of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    with full_precision(student):
        difference = (at_least_float32(student) - at_least_float32(teacher)).flatten(1)
        if kind == "frobenius":
            return torch.linalg.vector_norm(layout.pad(difference), dim=(1, 2)).sum()
        if kind == "norm":
            return torch.linalg.vector_norm(difference, dim=1).sum() / max(layout.total, 1)
    raise ValueError(f"Expected a distance out of frobenius, norm, relative, mse, standardised, got {kind!r}")


class InstanceFeatureLoss(nn.Module):
    """L_INS of one pyramid level (DRKD, arXiv:2302.05637, section 3.3): pooled instances, f(s_i) against t_i.

    Args:
        student_channels: Channels of the student's instances.
        teacher_channels: Channels of the teacher's instances.
        distance: See `instance_distance`; ``norm`` is the paper's, ``frobenius`` the released code's.
        adapter_init: See `make_adapter`.

    Shape:
        student: (sum N, Cs, r, r).
        teacher: (sum N, Ct, r, r), never given a gradient.
        output: 0-d, at least float32.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        distance: InstanceDistance = "mse",
        adapter_init: AdapterInit = "identity",
    ) -> None:
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.distance: InstanceDistance = distance
        self.adapter = make_adapter(student_channels, teacher_channels, init=adapter_init)

    def forward(self, student: Tensor, teacher: Tensor, *, layout: InstanceLayout) -> Tensor:
        """Distance between adapted student instances and the teacher's."""
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        with full_precision(student):
            adapted = adapt(self.adapter, student)
            return instance_distance(adapted, teacher.detach(), layout, kind=self.distance)
