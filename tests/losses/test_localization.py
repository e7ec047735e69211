"""Localization distillation beyond parity."""

import math

import pytest
import torch

from drkd.losses import bin_divergence, distance_overlap, valuable_region


def test_bins_by_hand():
    # KL of (3/4, 1/4) from (1/2, 1/2) at T 2, over two bins.
    teacher, student = torch.tensor([[2 * math.log(3.0), 0.0]] * 2), torch.zeros(2, 2)
    row = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert bin_divergence(student, teacher, temperature=2.0).item() == pytest.approx(row)
    weighted = bin_divergence(student, teacher, torch.tensor([0.5, 0.0]), temperature=2.0, normaliser=4.0)
    assert weighted.item() == pytest.approx(row * 0.5 / 4)


def test_zero_cases():
    student = torch.randn(5, 4, 8, requires_grad=True)
    same = bin_divergence(student, student.detach(), temperature=10.0)
    none = bin_divergence(student, torch.randn(5, 4, 8), torch.zeros(5, 4), temperature=10.0, normaliser=4.0)
    empty = bin_divergence(student[:0], student[:0], temperature=10.0)
    (same + none + empty).backward()
    assert same.item() == pytest.approx(0, abs=1e-6) and none.item() == empty.item() == 0
    assert student.grad.abs().max() < 1e-6


def test_gradient_reaches_the_student_only_in_any_precision():
    student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    value = bin_divergence(student, teacher, temperature=10.0)
    value.backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = bin_divergence(student.bfloat16(), teacher.bfloat16(), temperature=10.0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(value.item(), rel=0.1)


def test_errors_state_expected_and_got():
    with pytest.raises(ValueError, match="one shape"):
        bin_divergence(torch.zeros(2, 3), torch.zeros(3, 3), temperature=1.0)
    with pytest.raises(ValueError, match=r"\(2,\) rows, got \(3,\)"):
        bin_divergence(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3), temperature=1.0)


def test_valuable_region_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    # The same box, one shifted by 5 px, one far away.
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 0.0, 15.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    expected = 50 / 150 - 25 / (15**2 + 10**2)
    region = valuable_region(anchors, [box, torch.zeros(0, 4)], positive_overlap=0.5, share=0.25)
    assert region[0].tolist() == pytest.approx([0.0, expected, 0.0])
    assert region[1].eq(0).all()
    assert distance_overlap(anchors[1], box[0]).item() == pytest.approx(expected)
    assert valuable_region(anchors, [box], positive_overlap=0.5, share=0.9).eq(0).all()
