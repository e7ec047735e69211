"""PKD by hand and against the correlation."""

import pytest
import torch

from drkd.losses import PearsonLoss


def test_value_by_hand():
    # With n = 2 both become (-1, 1) / sqrt 2, in opposite order: they differ by sqrt 2, and half of its square is 1.
    student, teacher = (torch.tensor(pair).reshape(1, 1, 1, 2) for pair in ([0.0, 6.0], [4.0, 3.0]))
    assert PearsonLoss(1, 1)(student, teacher).item() == pytest.approx(1.0, rel=1e-5)


def test_is_one_minus_the_correlation():
    student, teacher = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    rows = [feature.transpose(0, 1).flatten(1) for feature in (student, teacher)]
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows, strict=True)]).mean()
    n = rows[0].shape[1]
    value = PearsonLoss(4, 4, eps=0.0)(student, teacher)
    assert value.item() == pytest.approx((n - 1) / n * (1 - correlation.item()), rel=1e-12)


def test_scale_and_shift_do_not_matter():
    student, teacher = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    loss = PearsonLoss(3, 3)
    assert loss(13 * student + 5, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-5)


def test_one_value_a_channel_gives_zero():
    student = torch.randn(1, 3, 1, 1, requires_grad=True)
    value = PearsonLoss(3, 3)(student, torch.randn(1, 3, 1, 1))
    value.backward()
    assert value.item() == 0 and student.grad.eq(0).all()
