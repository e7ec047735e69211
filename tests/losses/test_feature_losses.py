"""The cases that every loss of whole feature maps must pass alike; values by hand are in the files of each loss."""

from functools import partial

import pytest
import torch

from drkd.losses import (
    ChannelWiseLoss,
    FineGrainedLoss,
    FocalGlobalLoss,
    HintLoss,
    MaskedGenerationLoss,
    NonLocalLoss,
    PearsonLoss,
)

SIZE = (64, 96)
BOXES = [torch.tensor([[3.0, 4.0, 30.0, 40.0], [20.0, 10.0, 90.0, 60.0]]), torch.zeros(0, 4)]
LOSSES = [HintLoss, PearsonLoss, ChannelWiseLoss, MaskedGenerationLoss, FocalGlobalLoss, NonLocalLoss, FineGrainedLoss]
EVERY = pytest.mark.parametrize("kind", LOSSES)


def build(kind, student=8, teacher=16):
    torch.manual_seed(0)
    return kind(student, teacher)


def value_of(loss, student, teacher, boxes=BOXES):
    torch.manual_seed(1)  # for the mask that is drawn
    if isinstance(loss, FocalGlobalLoss | FineGrainedLoss):
        return loss(student, teacher, boxes, image_size=SIZE)
    return loss(student, teacher)


def maps(student=(2, 8, 8, 12), teacher=(2, 16, 8, 12)):
    torch.manual_seed(2)
    return torch.randn(student, requires_grad=True), torch.randn(teacher, requires_grad=True)


@EVERY
def test_gradient_to_the_student_only(kind):
    loss, (student, teacher) = build(kind), maps()
    value = value_of(loss, student, teacher)
    value.backward()
    assert value.ndim == 0 and value.dtype == torch.float32
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in loss.parameters())


@EVERY
@pytest.mark.parametrize("size", [(8, 12), (1, 1)])
def test_equal_maps(kind, size):
    """Zero, and no gradient, once the connectors pass the student's map through."""
    if kind is MaskedGenerationLoss:
        loss = build(partial(kind, masked_share=0.0), 4, 4)
        layers = [loss.generator[0], loss.generator[2]]
    elif kind is NonLocalLoss:
        loss = build(kind, 4, 4)
        layers = [loss.feature_adapter, loss.relation_adapter, loss.spatial_adapter]
        torch.nn.init.eye_(loss.channel_adapter.weight)
        torch.nn.init.zeros_(loss.channel_adapter.bias)
    else:
        loss = build(kind, 4, 4)
        layers = [loss.align.adapter] if kind is FineGrainedLoss else []
    for layer in layers:
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    # MGD's generator passes only what is above 0.
    student = torch.rand(2, 4, *size).requires_grad_()
    value = value_of(loss, student, student.detach().clone())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-9)
    assert student.grad.abs().max() < 1e-6


@EVERY
def test_autocast(kind):
    loss, (student, teacher) = build(kind), maps()
    plain = value_of(loss, student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = value_of(loss, student.bfloat16(), teacher.bfloat16())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(plain.item(), rel=0.03)


@EVERY
def test_sums_do_not_overflow_in_float16(kind):
    # Squares of these, and the number of positions, leave float16's range.
    loss = build(kind, 8, 8)
    student, teacher = (300 * torch.randn(1, 8, 64, 96).half() for _ in range(2))
    value = value_of(loss, student, teacher, BOXES[:1])
    assert value.dtype == torch.float32 and value.isfinite()


@EVERY
def test_channels_last(kind):
    loss, (student, teacher) = build(kind), maps()
    plain = value_of(loss, student, teacher)
    last = [tensor.to(memory_format=torch.channels_last) for tensor in (student, teacher)]
    assert value_of(loss, *last).item() == pytest.approx(plain.item(), rel=1e-5)


@EVERY
def test_no_boxes(kind):
    loss, (student, teacher) = build(kind), maps()
    value = value_of(loss, student, teacher, [torch.zeros(0, 4)] * 2)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
    assert (value == 0) == (kind is FineGrainedLoss)


@EVERY
@pytest.mark.parametrize("ours", [(4, 6), (16, 24), (8, 24), (9, 11)])
def test_sizes_are_brought_together(kind, ours):
    loss, (student, teacher) = build(kind), maps((2, 8, *ours))
    value_of(loss, student, teacher).backward()
    assert student.grad.abs().sum() > 0


@EVERY
def test_a_constant_channel_keeps_the_gradient_bounded(kind):
    loss, (student, teacher) = build(kind, 8, 8), maps(teacher=(2, 8, 8, 12))
    with torch.no_grad():
        student[:, 3] = 0.5
        teacher[:, 4] = 0.0
    value_of(loss, student, teacher).backward()
    assert student.grad.norm() < 100


@EVERY
def test_errors_state_expected_and_got(kind):
    loss, (student, teacher) = build(kind), maps()
    with pytest.raises(ValueError, match="Expected 8 student and 16 teacher channels, got 16 and 16"):
        value_of(loss, teacher, teacher)
    with pytest.raises(ValueError, match="one batch"):
        value_of(loss, student[:1], teacher)
    if kind in (FocalGlobalLoss, FineGrainedLoss):
        with pytest.raises(ValueError, match="boxes of 2 images, got 1"):
            value_of(loss, student, teacher, BOXES[:1])
        with pytest.raises(ValueError, match="for image 1"):
            value_of(loss, student, teacher, [BOXES[0], torch.zeros(4)])
