"""Box codes and overlaps, by hand and against torchvision."""

import pytest
import torch
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder
from torchvision.ops import complete_box_iou, distance_box_iou, generalized_box_iou

from drkd.losses import decode_distances, decode_offsets, distance_overlap, generalised_overlap


def some_boxes(count=20, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 50
    corners[:, 2:] += corners[:, :2] + 1
    return corners


def test_codes_by_hand():
    anchor = torch.tensor([10.0, 10.0, 30.0, 20.0])
    moved = decode_offsets(torch.tensor([0.5, -1.0, torch.log(torch.tensor(2.0)), 0.0]), anchor)
    torch.testing.assert_close(moved, torch.tensor([10.0, 0.0, 50.0, 10.0]))
    # The centre is (20, 15), sides 20 and 10.
    assert decode_distances(torch.tensor([1.0, 0.5, 0.25, 2.0]), anchor).tolist() == [0.0, 10.0, 25.0, 35.0]
    assert decode_offsets(torch.tensor([0.0, 0.0, 50.0, -50.0]), anchor).isfinite().all()


def test_codes_equal_torchvisions():
    anchors = some_boxes()
    codes = torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(decode_offsets(codes, anchors), BoxCoder((1.0,) * 4).decode_single(codes, anchors))
    torch.testing.assert_close(
        decode_distances(codes.abs(), anchors), BoxLinearCoder(normalize_by_size=True).decode(codes.abs(), anchors)
    )


def test_overlaps_equal_torchvisions():
    first, second = some_boxes(seed=1), some_boxes(seed=2)
    torch.testing.assert_close(generalised_overlap(first, second), generalized_box_iou(first, second).diagonal())
    pairs = distance_overlap(first.unsqueeze(1), second.unsqueeze(0))
    torch.testing.assert_close(pairs, distance_box_iou(first, second), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(pairs, complete_box_iou(first, second))


@pytest.mark.parametrize("overlap", [generalised_overlap, distance_overlap])
def test_overlaps_of_equal_and_empty_boxes(overlap):
    boxes = some_boxes()
    torch.testing.assert_close(overlap(boxes, boxes), torch.ones(20, dtype=torch.float64))
    points = torch.zeros(3, 4, requires_grad=True)
    value = overlap(points, torch.ones(3, 4)).sum()
    value.backward()
    assert value.isfinite() and points.grad.isfinite().all()


def test_apart_boxes_by_hand():
    # Unit boxes two apart: no intersection, union 2, hull 3.
    first, second = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 3.0, 1.0])
    assert generalised_overlap(first, second).item() == pytest.approx(-1 / 3)
    assert distance_overlap(first, second).item() == pytest.approx(-4 / 10)
