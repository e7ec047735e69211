"""Localization distillation: distributions over the bins of a box's sides, and where they are worth learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.losses.box_codes import distance_overlap
from drkd.losses.softened_logits import softened_divergence


def bin_divergence(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    *,
    temperature: float,
    normaliser: Tensor | float | None = None,
) -> Tensor:
    r"""LD's divergence of rows (Zheng et al., CVPR 2022, arXiv:2102.12252, equation 2), as the authors' code has it.

    .. math:: \frac{1}{N} \sum_r w_r \, \frac{T^2}{n} \sum_i p_{ri} (\log p_{ri} - \log q_{ri}), \quad
              p = \mathrm{softmax}(t / T), \; q = \mathrm{softmax}(s / T)

    The paper sums over the n bins; the code takes their mean. It serves for classes too.

    Args:
        student: (..., n) logits.
        teacher: Same shape; a constant.
        weight: (...), >= 0, a constant; None is 1.
        temperature: T, > 0.
        normaliser: N; None is the number of rows.

    Returns:
        0-d, nats, at least float32.

    Raises:
        ValueError: If shapes do not fit.
    """
    rows = softened_divergence(student, teacher, temperature=temperature, activation="softmax")
    rows = rows / max(student.shape[-1], 1)
    if weight is not None:
        if weight.shape != rows.shape:
            raise ValueError(f"Expected a weight for each of {tuple(rows.shape)} rows, got {tuple(weight.shape)}")
        rows = rows * weight.detach().to(rows.dtype)
    return rows.sum() / (max(rows.numel(), 1) if normaliser is None else normaliser)


def valuable_region(
    anchors: Tensor, boxes: Sequence[Tensor], *, positive_overlap: float = 0.5, share: float = 0.25
) -> Tensor:
    r"""How valuable each anchor is beside the positive ones (LD, arXiv:2102.12252, algorithm 1).

    With X the distance overlap of an anchor and a box, an anchor is valuable where
    :math:`\gamma \alpha \le \max_g X < \alpha`; its value is that largest X. The authors' :math:`\alpha` is the
    threshold of the ATSS assigner for each box; here it is one number.

    Args:
        anchors: (A, 4), xyxy px.
        boxes: Of each image, (N_b, 4), xyxy px.
        positive_overlap: Alpha, in (0, 1].
        share: Gamma, in [0, 1].

    Returns:
        (B, A), 0 where an anchor is not valuable.
    """
    found = []
    for own in boxes:
        # A box that is far from everything stands in where an image has none.
        own = torch.cat([own, own.new_full((1, 4), -1e6)]).to(anchors.dtype)
        best = distance_overlap(anchors.unsqueeze(1), own.unsqueeze(0)).amax(dim=1)
        found.append(torch.where((best >= share * positive_overlap) & (best < positive_overlap), best, 0.0))
    return torch.stack(found)
