"""What a method's weight is where its user gives none."""

from __future__ import annotations

from typing import TypeVar

from drkd.contracts import DetectorSpec

_Setting = TypeVar("_Setting")


def choose_weight(weight: float | None, *, balanced: bool, plain: float) -> float:
    """The weight of a term.

    Args:
        weight: What the user gave, or None.
        balanced: Whether weights are gradient ratios: then 1, as loud as the task, is what None stands for.
        plain: The authors' multiplier, what None stands for otherwise.

    Raises:
        ValueError: If the weight is not above 0.
    """
    if weight is None:
        return 1.0 if balanced else plain
    if weight <= 0:
        raise ValueError(f"Expected a weight above 0, got {weight}")
    return weight


def by_stages(student: DetectorSpec, one: _Setting, two: _Setting) -> _Setting:
    """A setting that differs for students that classify regions they have proposed, and for all others."""
    return two if student.predictions is not None and student.predictions.kind == "regions" else one
