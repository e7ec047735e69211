"""Classic distillation of predictions: softened class probabilities, and box offsets as they are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from drkd.losses.distance import at_least_float32, full_precision

ClassActivation = Literal["softmax", "sigmoid"]
"""Whether classes exclude each other."""


def softened_divergence(student: Tensor, teacher: Tensor, *, temperature: float, activation: ClassActivation) -> Tensor:
    r"""KL divergence of each row, :math:`T^2 \, \mathrm{KL}(p_t \| p_s)` at temperature T (arXiv:1503.02531).

    Args:
        student: (..., K) logits.
        teacher: Same shape; a constant to the gradient.
        temperature: T, unitless, > 0.
        activation: ``softmax``: one distribution of K classes; ``sigmoid``: the sum of K distributions of two.

    Returns:
        (...), nats, at least float32; exactly 0 where the rows are equal.

    Raises:
        ValueError: If the shapes differ, or the temperature or activation is out of range.
    """
    if student.shape != teacher.shape or student.ndim < 1:
        raise ValueError(f"Expected logits of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if temperature <= 0:
        raise ValueError(f"Expected a temperature above 0, got {temperature}")
    with full_precision(student):
        ours = at_least_float32(student) / temperature
        theirs = at_least_float32(teacher.detach()) / temperature
        if activation == "softmax":
            target = theirs.log_softmax(dim=-1)
            rows = (target.exp() * (target - ours.log_softmax(dim=-1))).sum(dim=-1)
        elif activation == "sigmoid":
            wanted = theirs.sigmoid()
            cross, own = (
                functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
                for logits in (ours, theirs)
            )
            rows = (cross - own).sum(dim=-1)
        else:
            raise ValueError(f"Expected an activation out of softmax, sigmoid, got {activation!r}")
        return temperature**2 * rows


def class_divergence(
    student: Tensor, teacher: Tensor, weight: Tensor, *, temperature: float, activation: ClassActivation
) -> Tensor:
    r"""Weighted mean of `softened_divergence` over rows, :math:`\sum_r w_r k_r / \max(1, \sum_r w_r)`.

    Args:
        student: (..., K) logits.
        teacher: Same shape.
        weight: (...), >= 0, such as 1 for matched anchors; a constant.
        temperature: See `softened_divergence`.
        activation: See `softened_divergence`.

    Returns:
        0-d, at least float32; exactly 0, with a zero gradient, where all weights are 0 or there is no row.
    """
    return weighted_mean(softened_divergence(student, teacher, temperature=temperature, activation=activation), weight)


def offset_distance(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over rows of the mean absolute difference of a box's four numbers.

    Args:
        student: (..., 4), in the code of the head.
        teacher: Same shape and code; a constant.
        weight: (...), >= 0; a constant.

    Returns:
        0-d, at least float32; exactly 0 where all weights are 0.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape or student.shape[-1:] != (4,):
        raise ValueError(f"Expected boxes (..., 4) of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    with full_precision(student):
        return weighted_mean((at_least_float32(student) - at_least_float32(teacher.detach())).abs().mean(-1), weight)


def weighted_mean(rows: Tensor, weight: Tensor) -> Tensor:
    """Sum of weighted rows over the sum of weights, which counts as 1 at least; the weights are constants."""
    if rows.shape != weight.shape:
        raise ValueError(f"Expected a weight for each of {tuple(rows.shape)} rows, got {tuple(weight.shape)}")
    with full_precision(rows):
        weight = weight.detach().to(rows.dtype)
        return torch.sum(rows * weight) / weight.sum().clamp_min(1.0)
