"""What a method's weight is where its user gives none."""

from __future__ import annotations


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
