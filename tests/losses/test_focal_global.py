"""FGD by hand, and its masks against a loop over boxes."""

import math

import pytest
import torch

from drkd.losses import (
    FocalGlobalLoss,
    GlobalContext,
    channel_attention,
    foreground_weights,
    rescale,
    spatial_attention,
)


def test_attention_by_hand():
    feature = torch.tensor([[-math.log(2.0), 0.0], [0.0, math.log(4.0)]]).double().reshape(1, 2, 1, 2)
    # Means over channels: (ln 2) / 2 and ln 2; at T = 0.5 their softmax is (2, 4) / 6, times two positions.
    assert spatial_attention(feature, temperature=0.5).flatten().tolist() == pytest.approx([2 / 3, 4 / 3])
    # Means over space are the same two numbers.
    assert channel_attention(feature, temperature=0.5).flatten().tolist() == pytest.approx([2 / 3, 4 / 3])


def test_masks_by_hand():
    boxes = [torch.tensor([[8.0, 8.0, 16.0, 16.0], [0.0, 0.0, 32.0, 8.0]]), torch.zeros(0, 4)]
    foreground, background = foreground_weights(boxes, torch.zeros(2, 1, 4, 4), image_size=(32, 32))
    # The first box has 2 x 2 cells, the second 2 x 5, a column of which lies outside; the smaller box wins.
    expected = torch.tensor([[0.1] * 4, [0.1, 0.25, 0.25, 0.1], [0, 0.25, 0.25, 0], [0] * 4])
    torch.testing.assert_close(foreground[0, 0], expected)
    torch.testing.assert_close(background[0, 0], (expected == 0) / 6)
    assert foreground[1].eq(0).all() and background[1].eq(1 / 16).all()


def slow_foreground(boxes, size, image_size):
    mask = torch.zeros(size).double()
    for x1, y1, x2, y2 in boxes.tolist():
        if (x1 < 0 >= x2) or (y1 < 0 >= y2):
            continue
        left, right = math.floor(x1 * size[1] / image_size[1]), math.ceil(x2 * size[1] / image_size[1])
        top, bottom = math.floor(y1 * size[0] / image_size[0]), math.ceil(y2 * size[0] / image_size[0])
        weight = 1 / ((bottom + 1 - top) * (right + 1 - left))
        for row in range(max(top, 0), min(bottom + 1, size[0])):
            for column in range(max(left, 0), min(right + 1, size[1])):
                mask[row, column] = max(mask[row, column], weight)
    return mask


def test_masks_equal_a_loop_over_boxes():
    # More boxes than are painted at once, some beyond the image.
    torch.manual_seed(0)
    corners = [torch.rand(count, 4, dtype=torch.float64) * 200 - 40 for count in (21, 0, 3)]
    boxes = [torch.cat((c[:, :2], c[:, :2] + c[:, 2:].abs() * 0.5), dim=1) for c in corners]
    feature = torch.zeros(3, 2, 13, 17, dtype=torch.float64)
    foreground, background = foreground_weights(boxes, feature, image_size=(90, 130))
    for image, expected in enumerate(slow_foreground(b, (13, 17), (90, 130)) for b in boxes):
        torch.testing.assert_close(foreground[image, 0], expected)
        torch.testing.assert_close(background[image, 0], (expected == 0).double() / (expected == 0).sum())


def test_boxes_that_cover_nothing():
    boxes = [
        torch.tensor(
            [
                [-50.0, -50.0, -20.0, -20.0],
                [20.0, 20.0, 4.0, 4.0],
                [80.0, 0.0, 90.0, 10.0],
                # Less than a cell before the map: rounded up, they end in its first cells.
                [-50.0, -50.0, -5.0, -5.0],
                [-50.0, 4.0, 0.0, 9.0],
                [4.0, -50.0, 9.0, -1.0],
            ]
        )
    ]
    foreground, background = foreground_weights(boxes, torch.zeros(1, 1, 4, 4), image_size=(32, 32))
    assert foreground.eq(0).all() and background.eq(1 / 16).all()
    touching = foreground_weights(
        [torch.tensor([[-50.0, -50.0, 1.0, 1.0]])], torch.zeros(1, 1, 4, 4), image_size=(32, 32)
    )
    assert touching[0][0, 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("boxes", "foreground", "background"),
    # One cell: its attentions are 1, and the box has 2 x 2 cells of which three lie outside.
    [(torch.zeros(0, 4), 0.0, 4.0), (torch.tensor([[0.0, 0.0, 8.0, 8.0]]), 1.0, 0.0)],
)
def test_value_by_hand(boxes, foreground, background):
    student, teacher = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    weights = {"foreground_weight": 2.0, "background_weight": 3.0, "attention_weight": 5.0, "relation_weight": 7.0}
    loss = FocalGlobalLoss(1, 1, **weights)
    parts = loss.parts(student, teacher, [boxes], image_size=(8, 8))
    # The global contexts start as the identity.
    assert [part.item() for part in parts] == [foreground, background, 0.0, 4.0]
    value = loss(student, teacher, [boxes], image_size=(8, 8))
    assert value.item() == pytest.approx(2 * foreground + 3 * background + 7 * 4)


def test_attention_part_by_hand():
    student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([math.log(2.0) / 2, 0.0]).reshape(1, 1, 1, 2)
    parts = FocalGlobalLoss(1, 1).parts(student, teacher, [torch.zeros(0, 4)], image_size=(8, 16))
    # The student's is (1, 1), the teacher's (4/3, 2/3); one channel attends to itself.
    assert parts[2].item() == pytest.approx(2 / 3)


def test_no_relation_no_context():
    loss = FocalGlobalLoss(4, 4, relation_weight=0.0)
    assert list(loss.parameters()) == []
    feature = torch.randn(2, 4, 3, 3)
    assert loss(feature, feature + 1, [torch.zeros(0, 4)] * 2, image_size=(8, 8)).item() > 0


def test_context_is_the_same_everywhere():
    context = GlobalContext(4)
    torch.nn.init.normal_(context.transform[3].weight)
    feature = torch.randn(2, 4, 3, 5)
    added = context(feature) - feature
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    assert added.abs().sum() > 0


def test_errors():
    with pytest.raises(ValueError, match="at least 0"):
        FocalGlobalLoss(1, 1, foreground_weight=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        FocalGlobalLoss(1, 1, temperature=0.0)


def effective(attention):
    """How many entries share an attention, on average over the images: 1 / sum p^2."""
    share = attention.flatten(1) / attention.flatten(1).sum(dim=1, keepdim=True)
    return (1 / share.square().sum(dim=1)).mean().item()


def loud_gradients(student, loss):
    """How many values have more than a hundredth of the largest gradient."""
    size = torch.autograd.grad(loss, student)[0].abs()
    return (size > size.max() / 100).sum().item()


def test_in_the_teachers_unit_large_features_have_attention_in_many_places():
    torch.manual_seed(0)
    student = (20 * torch.randn(2, 32, 16, 16)).requires_grad_()
    teacher = 20 * torch.randn(2, 32, 16, 16) * (0.5 + torch.rand(1, 32, 1, 1))
    boxes = [torch.tensor([[20.0, 20.0, 80.0, 90.0]])] * 2
    found = {}
    for scale in ("none", "teacher_rms"):
        measured = rescale(student, teacher, scale=scale)[1]
        kept = [effective(f(measured, temperature=0.5)) for f in (spatial_attention, channel_attention)]
        loss = FocalGlobalLoss(32, 32, attention_weight=0.0, relation_weight=0.0, scale=scale)
        found[scale] = (*kept, loud_gradients(student, loss(student, teacher, boxes, image_size=(128, 128))))
    assert found["none"][0] < 0.1 * 256 and found["none"][1] < 0.25 * 32
    assert found["teacher_rms"][0] > 0.8 * 256 and found["teacher_rms"][1] > 0.6 * 32
    assert found["teacher_rms"][2] > 5 * found["none"][2]
