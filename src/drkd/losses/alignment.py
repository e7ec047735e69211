"""Bring a student's map to the teacher's shape: a convolution for channels, bilinear resampling for space."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from drkd.losses.distance import at_least_float32, full_precision

AdapterInit = Literal["identity", "default", "none"]
"""Start of an adapter; see `make_adapter`."""

FeatureScale = Literal["none", "teacher_rms"]
"""Unit in which a pair of maps is measured; see `rescale`."""


def make_adapter(
    student_channels: int,
    teacher_channels: int,
    *,
    init: AdapterInit = "identity",
    kernel_size: int = 1,
    separable: bool = False,
) -> nn.Module:
    """A convolution from the student's channels to the teacher's, the ``f`` of the paper.

    Args:
        student_channels: Channels in.
        teacher_channels: Channels out.
        init: ``identity`` passes the student through where the widths are equal, else draws weights that keep the
            variance, bias zero; ``default`` is torch's; ``none`` has no adapter at all, for maps that are adapted
            already.
        kernel_size: Cells a side, odd; the map is padded with zeros to keep its size.
        separable: More than one cell a side as a convolution of each channel by itself and one of a single cell
            across channels, which costs little more than the latter alone. A kernel of one cell is the same either way.
    """
    if init == "none":
        if student_channels != teacher_channels:
            raise ValueError(f"Expected equal channels without an adapter, got {student_channels}, {teacher_channels}")
        return nn.Identity()
    if separable and kernel_size > 1:
        spatial = nn.Conv2d(
            student_channels,
            student_channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=student_channels,
            bias=False,
        )
        _start(spatial, init, equal=student_channels == teacher_channels, square=True)
        return nn.Sequential(spatial, make_adapter(student_channels, teacher_channels, init=init))
    adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=kernel_size, padding=kernel_size // 2)
    _start(adapter, init, equal=student_channels == teacher_channels)
    return adapter


def check_adapter(init: AdapterInit, *, always: bool) -> None:
    """Refuse an adapter that is asked for everywhere and for no place, for losses that have none by default."""
    if always and init == "none":
        raise ValueError(
            "Expected always_adapt false with adapter_init 'none', which has no adapter at all, or the adapter_init "
            "identity or default, got always_adapt true and adapter_init 'none'"
        )


def make_linear_adapter(student_channels: int, teacher_channels: int, *, init: AdapterInit = "identity") -> nn.Module:
    """The same for vectors (B, C): a linear layer, see `make_adapter`."""
    if init == "none":
        return make_adapter(student_channels, teacher_channels, init=init)
    adapter = nn.Linear(student_channels, teacher_channels)
    _start(adapter, init, equal=student_channels == teacher_channels)
    return adapter


def _start(adapter: nn.Conv2d | nn.Linear, init: AdapterInit, *, equal: bool, square: bool = False) -> None:
    """Give an adapter that torch has filled its start; ``square`` is of a part that keeps the channels anyway."""
    if init == "identity":
        if not equal and not square:
            nn.init.normal_(adapter.weight, std=adapter.weight[0].numel() ** -0.5)
        elif isinstance(adapter, nn.Linear):
            nn.init.eye_(adapter.weight)
        else:
            nn.init.dirac_(adapter.weight, groups=adapter.groups)
        if adapter.bias is not None:
            nn.init.zeros_(adapter.bias)
    elif init != "default":
        raise ValueError(f"Expected an adapter init out of identity, default, none, got {init!r}")
    adapter.random_start = equal and init == "default"  # type: ignore[assignment]  # a note, no parameter


def starts_at_random(module: nn.Module) -> bool:
    """Whether this is an adapter that began as a random basis where it could have let all pass, see `make_adapter`."""
    return bool(getattr(module, "random_start", False))


def adapt(adapter: nn.Module, feature: Tensor) -> Tensor:
    """Apply an adapter to a map, in the precision of the adapter's weights."""
    weight = next(adapter.parameters(), None)
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


def check_scale(scale: FeatureScale) -> None:
    """Raise a ValueError unless the scale is one that `rescale` knows."""
    if scale not in ("none", "teacher_rms"):
        raise ValueError(f"Expected a scale out of none, teacher_rms, got {scale!r}")


def rescale(student: Tensor, teacher: Tensor, *, scale: FeatureScale) -> tuple[Tensor, Tensor]:
    r"""Measure both maps in one unit, that of the teacher's; for losses with constants in units of the feature.

    A softmax of magnitudes over an absolute temperature is nearly even where the features are small against it, and
    nearly one-hot where they are large: the attention is then a choice of one place, and so is the gradient.

    Args:
        student: (B, Cs, h, w), before its adapter.
        teacher: (B, Ct, H, W).
        scale: ``none`` returns both as they are; ``teacher_rms`` divides both by the root mean square of the teacher's
            map over the batch of this process, a constant to the gradient. A map of zeros, below 1e-6, has the unit 1.
            Nothing waits for the device.

    Returns:
        Both maps, same shapes; with ``teacher_rms`` at least float32.
    """
    if scale == "none":
        return student, teacher
    with full_precision(teacher):
        student, teacher = at_least_float32(student), at_least_float32(teacher)
        size = torch.linalg.vector_norm(teacher.detach()) / max(teacher.numel(), 1) ** 0.5
        unit = torch.where(size > 1e-6, size, torch.ones_like(size))
        return student / unit, teacher / unit


class MapAdapter(nn.Module):
    """Brings a pair of maps to one shape, the teacher's, ready to be compared.

    Args:
        student_channels: Channels of the student's map.
        teacher_channels: Channels of the teacher's map.
        always: Put an adapter on the student's side even where the channels are equal.
        init: See `make_adapter`.
        kernel_size: Of the adapter, see `make_adapter`.

    Shape:
        student: (B, Cs, h, w); adapted, then resampled bilinearly to the teacher's size where it differs.
        teacher: (B, Ct, H, W).
        output: both (B, Ct, H, W), at least float32; the teacher's detached.

    Raises:
        ValueError: If batch or channels are not as declared.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        always: bool = False,
        init: AdapterInit = "default",
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        self.student_channels = student_channels
        self.teacher_channels = teacher_channels
        self.adapter: nn.Module = nn.Identity()
        if always or student_channels != teacher_channels:
            self.adapter = make_adapter(student_channels, teacher_channels, init=init, kernel_size=kernel_size)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The student's map in the teacher's shape, and the teacher's as a constant."""
        check_maps(student, teacher, student_channels=self.student_channels, teacher_channels=self.teacher_channels)
        adapted = at_least_float32(adapt(self.adapter, student))
        return resample(adapted, (teacher.shape[-2], teacher.shape[-1])), at_least_float32(teacher.detach())
