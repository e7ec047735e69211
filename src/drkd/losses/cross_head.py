"""CrossKD's two losses between the teacher's predictions and those of its head on the student's features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from drkd.losses.box_codes import generalised_overlap
from drkd.losses.distance import at_least_float32, full_precision

_EPS = torch.finfo(torch.float32).eps


def quality_focal_distance(
    student: Tensor, teacher: Tensor, weight: Tensor, *, normaliser: Tensor, beta: float = 1.0
) -> Tensor:
    r"""Classes of CrossKD (Wang et al., CVPR 2024, arXiv:2306.11369, section 3), a quality focal loss.

    Its form is equation 2 of arXiv:2006.04388.

    .. math:: \frac{1}{n} \sum_r w_r \sum_c |\sigma(s_{rc}) - \sigma(t_{rc})|^\beta \,
              \mathrm{BCE}(\sigma(s_{rc}), \sigma(t_{rc}))

    As in the authors' code, the gradient flows through the focal factor too, and the float32 epsilon is added to n.

    Args:
        student: (..., K), logits of the teacher's head on the student's features.
        teacher: Same shape, the teacher's logits; a constant.
        weight: (...), >= 0: 0 for anchors that neither are positive nor background; a constant.
        normaliser: 0-d, n: positives of the student's assignment, at least 1.
        beta: Focusing, 0 or at least 1: between them the gradient at equal probabilities is infinite.

    Returns:
        0-d, at least float32; 0 where all weights are, or all probabilities are equal and ``beta`` > 0. There the value
        has a kink for ``beta`` 1: next to equality the gradient is as large as the entropy of the target.

    Raises:
        ValueError: If the shapes differ or beta is out of range.
    """
    _check(student, teacher, weight)
    if not (beta == 0 or beta >= 1):
        raise ValueError(f"Expected a beta of 0 or at least 1, got {beta}")
    with full_precision(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        target = teacher.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(student, target, reduction="none")
        focal = (student.sigmoid() - target).abs().pow(beta)
        rows = (focal * entropy).sum(dim=-1)
        return _normalise(rows, weight, normaliser)


def overlap_distance(student: Tensor, teacher: Tensor, weight: Tensor, *, normaliser: Tensor) -> Tensor:
    r"""Boxes of CrossKD (arXiv:2306.11369, section 3): :math:`\frac{1}{n} \sum_r w_r (1 - \mathrm{GIoU}(s_r, t_r))`.

    Args:
        student: (..., 4), xyxy px, of the teacher's head on the student's features.
        teacher: Same shape, the teacher's boxes; a constant.
        weight: (...), >= 0: the teacher's largest class probability in the authors' code; a constant.
        normaliser: 0-d, n, as in `quality_focal_distance`; not the sum of the weights.

    Returns:
        0-d, at least float32; two boxes without area count as apart.

    Raises:
        ValueError: If the shapes differ.
    """
    _check(student, teacher, weight)
    with full_precision(student):
        rows = 1.0 - generalised_overlap(at_least_float32(student), at_least_float32(teacher.detach()))
        return _normalise(rows, weight, normaliser)


def align_scale(student: Tensor, teacher: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Give each channel of the student's map the mean and deviation, over batch and space, of the teacher's.

    The teacher's head was trained on maps of its own scale. Deviations from the authors' code: the teacher's
    statistics are constants, and one value a channel has a deviation of 0 (there NaN).

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w).
        eps: Added to the student's deviation.

    Returns:
        (B, C, h, w), at least float32.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            "Expected maps (B, C, h, w) with equal channels, "
            f"got student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    with full_precision(student):
        student = at_least_float32(student)
        ours, theirs = (_moments(entry) for entry in (student, at_least_float32(teacher.detach())))
        return (student - ours[1]) / (ours[0] + eps) * theirs[0] + theirs[1]


def _moments(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation (unbiased) and mean of each channel."""
    several = feature.shape[0] * feature.shape[2] * feature.shape[3] > 1
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), correction=int(several), keepdim=True)
    # The square root's gradient at 0 is infinite; a channel that is constant has nothing to scale.
    flat = variance == 0
    deviation = torch.where(flat, 1.0, variance).sqrt()
    return torch.where(flat, 0.0, deviation), mean


def _normalise(rows: Tensor, weight: Tensor, normaliser: Tensor) -> Tensor:
    return torch.sum(rows * weight.detach().to(rows.dtype)) / (normaliser.detach().to(rows.dtype) + _EPS)


def _check(student: Tensor, teacher: Tensor, weight: Tensor) -> None:
    if student.shape != teacher.shape or student.shape[:-1] != weight.shape:
        raise ValueError(
            "Expected predictions of one shape and a weight for each, "
            f"got {tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(weight.shape)}"
        )
