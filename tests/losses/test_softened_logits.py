"""Softened class divergences and box offsets."""

import math

import pytest
import torch
from torch.nn import functional

from drkd.losses import class_divergence, offset_distance, softened_divergence

KINDS = pytest.mark.parametrize("activation", ["softmax", "sigmoid"])


def test_softmax_by_hand():
    # At T 2 the teacher says 3/4, 1/4 and the student 1/2, 1/2.
    teacher, student = torch.tensor([2 * math.log(3.0), 0.0]), torch.zeros(2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_divergence(student, teacher, temperature=2.0, activation="softmax").item() == pytest.approx(
        expected
    )


def test_sigmoid_by_hand():
    # Two classes, each 3/4 or 1/4 at T 2 for the teacher, 1/2 for the student.
    teacher, student = torch.tensor([2 * math.log(3.0), -2 * math.log(3.0)]), torch.zeros(2)
    expected = 4 * 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_divergence(student, teacher, temperature=2.0, activation="sigmoid").item() == pytest.approx(
        expected
    )


def test_softmax_equals_torchs():
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = 9 * functional.kl_div(
        (student / 3).log_softmax(-1), (teacher / 3).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    got = class_divergence(student, teacher, torch.ones(7), temperature=3.0, activation="softmax")
    torch.testing.assert_close(got, expected)


@KINDS
def test_gradient_is_that_of_cross_entropy_and_reaches_the_student_only(activation):
    student, teacher = torch.randn(2, 6, 4, dtype=torch.float64)
    student.requires_grad_()
    teacher.requires_grad_()
    weight = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64, requires_grad=True)
    class_divergence(student, teacher, weight, temperature=2.0, activation=activation).backward()
    assert teacher.grad is None and weight.grad is None
    squash = torch.sigmoid if activation == "sigmoid" else lambda logits: logits.softmax(-1)
    expected = 2.0 * (squash(student / 2) - squash(teacher / 2)) * weight.detach().unsqueeze(1) / 3
    torch.testing.assert_close(student.grad, expected.detach())


@KINDS
def test_equal_logits_give_zero(activation):
    student = (torch.randn(5, 4) * 8).requires_grad_()
    value = class_divergence(student, student.detach(), torch.ones(5), temperature=2.0, activation=activation)
    value.backward()
    assert value.item() == 0 and student.grad.abs().max() < 1e-6


@KINDS
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_matched_gives_exactly_zero(activation, rows):
    student, teacher, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(rows, 4), torch.zeros(rows)
    value = class_divergence(student, teacher, weight, temperature=2.0, activation=activation)
    value = value + offset_distance(student, teacher, weight)
    value.backward()
    assert value.item() == 0 and student.grad.eq(0).all()


@KINDS
def test_large_logits_stay_finite(activation):
    student = torch.tensor([[500.0, -500.0]], requires_grad=True)
    value = softened_divergence(student, -student.detach(), temperature=1.0, activation=activation).sum()
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()


@KINDS
def test_half_precision(activation):
    student, teacher = torch.randn(2, 6, 4)
    plain = class_divergence(student, teacher, torch.ones(6), temperature=2.0, activation=activation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = class_divergence(
            student.bfloat16(), teacher.bfloat16(), torch.ones(6), temperature=2.0, activation=activation
        )
    assert half.dtype == torch.float32 and half.ndim == 0
    assert half.item() == pytest.approx(plain.item(), rel=0.05)


def test_offsets_by_hand():
    student = torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 9.0, 9.0, 9.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    value = offset_distance(student, teacher, torch.tensor([1.0, 0.0]))
    assert value.item() == 2.0
    value.backward()
    assert teacher.grad is None and student.grad.tolist() == [[0.25] * 4, [0.0] * 4]


def test_errors_state_expected_and_got():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(2, 4\)"):
        softened_divergence(torch.zeros(2, 3), torch.zeros(2, 4), temperature=1.0, activation="softmax")
    with pytest.raises(ValueError, match="above 0, got 0"):
        softened_divergence(torch.zeros(2), torch.zeros(2), temperature=0, activation="softmax")
    with pytest.raises(ValueError, match="got 'relu'"):
        softened_divergence(torch.zeros(2), torch.zeros(2), temperature=1.0, activation="relu")
    with pytest.raises(ValueError, match=r"each of \(2,\) rows, got \(3,\)"):
        offset_distance(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"boxes \(\.\.\., 4\)"):
        offset_distance(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
