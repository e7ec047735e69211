"""CrossKD's losses beyond parity."""

import math

import pytest
import torch

from drkd.losses import align_scale, overlap_distance, quality_focal_distance

ONE = torch.tensor(1.0)


def test_classes_by_hand():
    # Probabilities 1/2 and 3/4: |1/4| * (-3/4 ln 1/2 - 1/4 ln 1/2) = ln(2) / 4; the second row has no weight.
    student = torch.zeros(2, 1)
    teacher = torch.full((2, 1), math.log(3.0))
    value = quality_focal_distance(student, teacher, torch.tensor([1.0, 0.0]), normaliser=torch.tensor(2.0))
    assert value.item() == pytest.approx(math.log(2) / 8, rel=1e-6)
    squared = quality_focal_distance(student, teacher, torch.tensor([1.0, 0.0]), normaliser=torch.tensor(2.0), beta=2.0)
    assert squared.item() == pytest.approx(math.log(2) / 32, rel=1e-6)


def test_boxes_by_hand():
    student = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    value = overlap_distance(student, teacher, torch.tensor([0.5]), normaliser=ONE)
    assert value.item() == pytest.approx(0.5 * 4 / 3, rel=1e-6)


def test_equal_predictions_give_zero():
    logits = torch.randn(6, 3, requires_grad=True)
    value = quality_focal_distance(logits, logits.detach(), torch.ones(6), normaliser=ONE)
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]], requires_grad=True)
    value = value + overlap_distance(boxes, boxes.detach(), torch.ones(1), normaliser=ONE)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().max() < 1e-6


def test_weights_of_zero_and_no_rows_give_exactly_zero():
    for count in (0, 4):
        logits, boxes = torch.randn(count, 3, requires_grad=True), torch.rand(count, 4, requires_grad=True)
        weight = torch.zeros(count)
        value = quality_focal_distance(logits, torch.randn(count, 3), weight, normaliser=ONE)
        value = value + overlap_distance(boxes, torch.rand(count, 4), weight, normaliser=ONE)
        value.backward()
        assert value.item() == 0 and logits.grad.eq(0).all() and boxes.grad.eq(0).all()


def test_gradient_reaches_the_student_only():
    ours, theirs = torch.randn(2, 4, 3).unbind()
    boxes = torch.rand(4, 4) + torch.tensor([0.0, 0.0, 2.0, 2.0])
    tensors = [ours, theirs, boxes, boxes + 0.3]
    for tensor in tensors:
        tensor.requires_grad_()
    weight = torch.ones(4, requires_grad=True)
    value = quality_focal_distance(tensors[0], tensors[1], weight, normaliser=ONE)
    (value + overlap_distance(tensors[2], tensors[3].detach().requires_grad_(), weight, normaliser=ONE)).backward()
    assert tensors[0].grad.abs().sum() > 0 and tensors[2].grad.abs().sum() > 0
    assert tensors[1].grad is None and weight.grad is None


def test_half_precision():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 8, 3)
    plain = quality_focal_distance(ours, theirs, torch.ones(8), normaliser=ONE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = quality_focal_distance(ours.bfloat16(), theirs.bfloat16(), torch.ones(8), normaliser=ONE)
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).bfloat16()
        overlap = overlap_distance(boxes, boxes + 2, torch.ones(1), normaliser=ONE)
        scaled = align_scale(torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16())
    assert half.dtype == overlap.dtype == scaled.dtype == torch.float32
    assert half.item() == pytest.approx(plain.item(), rel=0.05)


def test_scale_is_the_teachers():
    student, teacher = torch.randn(2, 3, 6, 5) * 7 + 2, torch.randn(2, 3, 4, 4) * 0.3 - 1
    out = align_scale(student, teacher)
    for part in (torch.mean, torch.std):
        torch.testing.assert_close(part(out, dim=(0, 2, 3)), part(teacher, dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
    last = align_scale(student.to(memory_format=torch.channels_last), teacher)
    torch.testing.assert_close(last, out)


def test_constant_channels_and_single_values_stay_finite():
    for shape in ((1, 3, 1, 1), (2, 3, 4, 4)):
        student = torch.ones(shape, requires_grad=True)
        out = align_scale(student, torch.randn(shape))
        out.sum().backward()
        assert out.isfinite().all() and student.grad.isfinite().all()


def test_errors_state_expected_and_got():
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 4\) and \(2,\)"):
        quality_focal_distance(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2), normaliser=ONE)
    with pytest.raises(ValueError, match=r"and \(3,\)"):
        overlap_distance(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(3), normaliser=ONE)
    for beta in (0.5, -1.0):
        with pytest.raises(ValueError, match=f"beta of 0 or at least 1, got {beta}"):
            quality_focal_distance(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), normaliser=ONE, beta=beta)
    with pytest.raises(ValueError, match="equal channels"):
        align_scale(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2))
