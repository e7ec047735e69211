"""FGFI and its anchors by hand, and its mask against boxes made one by one."""

import pytest
import torch
from torchvision.ops import box_iou

from drkd.losses import FineGrainedLoss, level_anchors

FIRST_CELL = torch.tensor([[-4.0, -4.0, 4.0, 4.0]])
BETWEEN = torch.tensor([[0.0, -4.0, 8.0, 4.0]])


def corners(vertical, horizontal):
    """(A, H, W, 4) xyxy px of the separate extents."""
    count, height, width = len(vertical), vertical.shape[1], horizontal.shape[1]
    rows = vertical[:, :, None].expand(count, height, width, 2)
    columns = horizontal[:, None].expand(count, height, width, 2)
    return torch.stack((columns[..., 0], rows[..., 0], columns[..., 1], rows[..., 1]), dim=-1)


def test_centred_anchors_by_hand():
    options = {"scales": (2.0,), "ratios": (1.0, 4.0), "style": "centred", "like": torch.zeros(1)}
    anchors = corners(*level_anchors((2, 1), (8.0, 8.0), **options))
    assert anchors[0, :, 0].tolist() == [[-8, -8, 8, 8], [-8, 0, 8, 16]]
    assert anchors[1, 0, 0].tolist() == [-4, -16, 4, 16]  # a ratio is height over width


def test_inclusive_anchors_are_those_of_faster_rcnn():
    options = {"scales": (8, 16), "ratios": (0.5, 1, 2), "style": "inclusive", "like": torch.zeros(1)}
    anchors = corners(*level_anchors((1, 2), (16.0, 16.0), **options))
    expected = [[-84, -40, 99, 55], [-176, -88, 191, 103], [-56, -56, 71, 71]]
    expected += [[-120, -120, 135, 135], [-36, -80, 51, 95], [-80, -168, 95, 183]]
    assert anchors[:, 0, 0].tolist() == expected
    assert anchors[0, 0, 1].tolist() == [-84 + 16, -40, 99 + 16, 55]


def simple(**options):
    """Anchors of one cell, and a connector that does nothing."""
    loss = FineGrainedLoss(1, 1, scales=(1.0,), ratios=(1.0,), **options)
    torch.nn.init.dirac_(loss.align.adapter.weight)
    torch.nn.init.zeros_(loss.align.adapter.bias)
    return loss


@pytest.mark.parametrize(
    ("boxes", "expected"),
    # Differences 2 and 6. A box on the first cell's anchor leaves the second out; one between them takes both in.
    [(FIRST_CELL, 4 / 2), (BETWEEN, (4 + 36) / 4), (torch.cat((FIRST_CELL, BETWEEN)), (4 + 36) / 4)],
)
def test_value_by_hand(boxes, expected):
    student, teacher = torch.ones(1, 1, 1, 2), torch.tensor([3.0, 7.0]).reshape(1, 1, 1, 2)
    assert simple()(student, teacher, [boxes], image_size=(8, 16)).item() == pytest.approx(expected)


def test_positions_are_counted_not_values():
    loss = FineGrainedLoss(2, 2, scales=(1.0,), ratios=(1.0,))
    torch.nn.init.zeros_(loss.align.adapter.weight)
    torch.nn.init.zeros_(loss.align.adapter.bias)
    teacher = torch.ones(1, 2, 1, 2)
    assert loss(torch.zeros_like(teacher), teacher, [FIRST_CELL], image_size=(8, 16)).item() == 2 / 2


def test_activation_cuts_the_student():
    student, teacher = torch.full((1, 1, 1, 2), -1.0), torch.ones(1, 1, 1, 2)
    assert simple()(student, teacher, [FIRST_CELL], image_size=(8, 16)).item() == 2.0
    assert simple(activation=True)(student, teacher, [FIRST_CELL], image_size=(8, 16)).item() == 0.5


@pytest.mark.parametrize(("sizes", "inside"), [((0.0, 9.0), False), ((9.0, 10.0), True), ((10.0, 99.0), False)])
def test_boxes_of_other_sizes_belong_elsewhere(sizes, inside):
    # This box measures sqrt((8 + 1) (8 + 1)) = 9.
    mask = simple(box_sizes=sizes).mask(torch.zeros(1, 1, 1, 2), [FIRST_CELL], image_size=(8, 16))
    assert mask.any().item() == inside


def test_mask_equals_boxes_one_by_one():
    torch.manual_seed(0)
    starts, sides = torch.rand(3, 19, 2).double() * 100 - 20, torch.rand(3, 19, 2).double() * 60
    boxes = list(torch.cat((starts, starts + sides), dim=2))
    boxes[1] = boxes[1][:0]
    loss = FineGrainedLoss(1, 1, scales=(2.0, 4.0))
    feature = torch.zeros(3, 1, 7, 9, dtype=torch.float64)
    mask = loss.mask(feature, boxes, image_size=(56, 90))
    options = {"scales": (2.0, 4.0), "ratios": (0.5, 1.0, 2.0), "style": "centred", "like": feature}
    anchors = corners(*level_anchors((7, 9), (8.0, 10.0), **options))
    for image, those in enumerate(boxes):
        iou = box_iou(those, anchors.reshape(-1, 4)).reshape(-1, *anchors.shape[:3])
        near = iou > 0.5 * iou.amax(dim=(1, 2, 3), keepdim=True)
        assert mask[image, 0].equal(near.any(dim=1).any(dim=0))


@pytest.mark.parametrize("style", ["centred", "inclusive"])
def test_boxes_that_reach_no_anchor(style):
    boxes = torch.tensor([[900.0, 900, 950, 950], [5, 5, 5, 5], [30, 30, 10, 10], [30, 30, 29, 29], [-900, 0, -800, 9]])
    loss = FineGrainedLoss(1, 1, anchor_style=style)
    student = torch.randn(1, 1, 4, 4, requires_grad=True)
    value = loss(student, torch.randn(1, 1, 4, 4), [boxes], image_size=(64, 64))
    value.backward()
    assert value.item() == 0 and student.grad.eq(0).all()


def test_errors():
    with pytest.raises(ValueError, match="threshold in"):
        FineGrainedLoss(1, 1, threshold=1.0)
    with pytest.raises(ValueError, match="scales and ratios above 0"):
        FineGrainedLoss(1, 1, scales=())
    with pytest.raises(ValueError, match="centred, inclusive, got 'corner'"):
        FineGrainedLoss(1, 1, anchor_style="corner")
