"""Bring a student's map to the teacher's shape: 1x1 adapter for channels, bilinear resampling for space."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

AdapterInit = Literal["identity", "default", "none"]
"""Start of a 1x1 adapter; see `make_adapter`."""


def make_adapter(student_channels: int, teacher_channels: int, *, init: AdapterInit = "identity") -> nn.Module:
    """A 1x1 convolution from the student's channels to the teacher's, the ``f`` of the paper.

    Args:
        student_channels: Channels in.
        teacher_channels: Channels out.
        init: ``identity`` passes the student through where the widths are equal, else draws weights that keep the
            variance, bias zero; ``default`` is torch's; ``none`` has no adapter at all, for maps that are adapted
            already.
    """
    if init == "none":
        if student_channels != teacher_channels:
            raise ValueError(f"Expected equal channels without an adapter, got {student_channels}, {teacher_channels}")
        return nn.Identity()
    adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
    if init == "identity":
        if student_channels == teacher_channels:
            nn.init.dirac_(adapter.weight)
        else:
            nn.init.normal_(adapter.weight, std=student_channels**-0.5)
        if adapter.bias is not None:
            nn.init.zeros_(adapter.bias)
    elif init != "default":
        raise ValueError(f"Expected an adapter init out of identity, default, none, got {init!r}")
    return adapter


def adapt(adapter: nn.Module, feature: Tensor) -> Tensor:
    """Apply an adapter to a map, in the precision of the adapter's weights."""
    weight = getattr(adapter, "weight", None)
    adapted: Tensor = adapter(feature if weight is None else feature.to(weight.dtype))
    return adapted


def resample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, C, h, w) to (B, C, *size) bilinearly; the same tensor where the size is right already."""
    if (feature.shape[-2], feature.shape[-1]) == size:
        return feature
    return functional.interpolate(feature, size=size, mode="bilinear", align_corners=False)


def check_maps(student: Tensor, teacher: Tensor, *, student_channels: int, teacher_channels: int) -> None:
    """Raise a ValueError unless both are (B, C, h, w) of one batch with the declared channels."""
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            "Expected maps (B, C, h, w) of one batch, "
            f"got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    if student.shape[1] != student_channels or teacher.shape[1] != teacher_channels:
        raise ValueError(
            f"Expected {student_channels} student and {teacher_channels} teacher channels, "
            f"got {student.shape[1]} and {teacher.shape[1]}"
        )
