"""Pooling of instances and their layout."""

import pytest
import torch
from torchvision.ops import roi_align

from drkd.losses import InstanceLayout, pool_instances

BOXES = [torch.tensor([[1.0, 2.0, 20.0, 30.0], [0.0, 0.0, 32.0, 64.0]]), torch.zeros(0, 4), torch.tensor([[4.0] * 4])]


def test_layout_by_hand():
    layout = InstanceLayout.build([2, 0, 1], "cpu")
    flat = torch.tensor([[1.0], [2.0], [3.0]])
    padded = layout.pad(flat)
    assert padded.squeeze(2).tolist() == [[1, 2], [0, 0], [3, 0]]
    assert layout.mask.tolist() == [[True, True], [False, False], [True, False]]
    assert layout.group.tolist() == [0, 0, 2]
    assert layout.unpad(padded).equal(flat)


@pytest.mark.parametrize("counts", [[0], [0, 0], []])
def test_empty_layout(counts):
    layout = InstanceLayout.build(counts, "cpu")
    assert layout.pad(torch.zeros(0, 5)).shape == (len(counts), 0, 5)
    assert layout.unpad(torch.zeros(len(counts), 0, 5)).shape == (0, 5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_equals_one_image_at_a_time(aligned, sampling_ratio):
    feature = torch.randn(3, 5, 16, 8, dtype=torch.float64)
    options = {"aligned": aligned, "sampling_ratio": sampling_ratio}
    pooled = pool_instances(feature, BOXES, image_size=(64, 32), **options)
    single = [
        roi_align(feature[i : i + 1], [boxes.double()], 3, spatial_scale=0.25, **options)
        for i, boxes in enumerate(BOXES)
    ]
    torch.testing.assert_close(pooled, torch.cat(single))


def test_vertical_and_horizontal_strides_differ():
    # A ramp in y on a map of stride 8 x 2: the centre of the box, y = 32 px, is row 32 / 8 - 0.5 of the map.
    ramp = torch.arange(8.0).reshape(1, 1, 8, 1).expand(1, 1, 8, 16)
    pooled = pool_instances(ramp, [torch.tensor([[4.0, 16.0, 28.0, 48.0]])], image_size=(64, 32))
    assert pooled[0, 0, 1].tolist() == pytest.approx([3.5] * 3)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [2, -1])
def test_odd_boxes_stay_finite(aligned, sampling_ratio):
    boxes = [torch.tensor([[500.0, 500, 600, 600], [-50, -50, -10, -10], [5, 5, 5, 5], [9, 9, 3, 3], [-9, -9, 99, 99]])]
    feature = torch.randn(1, 2, 8, 8, requires_grad=True)
    pooled = pool_instances(feature, boxes, image_size=(32, 32), aligned=aligned, sampling_ratio=sampling_ratio)
    pooled.sum().backward()
    assert pooled.isfinite().all() and feature.grad.isfinite().all()
    assert pooled[:2].eq(0).all()


def test_no_boxes_keep_the_graph():
    feature = torch.randn(2, 4, 8, 8, requires_grad=True)
    pooled = pool_instances(feature, [torch.zeros(0, 4)] * 2, image_size=(32, 32))
    assert pooled.shape == (0, 4, 3, 3)
    pooled.sum().backward()
    assert feature.grad.eq(0).all()


def test_half_precision_pools_in_float32():
    feature = torch.randn(1, 4, 8, 8)
    boxes = [torch.tensor([[3.3, 4.4, 20.1, 30.7]])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pool_instances(feature.bfloat16(), boxes, image_size=(32, 32))
    torch.testing.assert_close(pooled, pool_instances(feature.bfloat16().float(), boxes, image_size=(32, 32)))


def test_shape_errors():
    with pytest.raises(ValueError, match="image 0"):
        pool_instances(torch.zeros(1, 4, 8, 8), [torch.zeros(0)], image_size=(32, 32))
    with pytest.raises(ValueError, match="B tensors of boxes"):
        pool_instances(torch.zeros(2, 4, 8, 8), [torch.zeros(0, 4)], image_size=(32, 32))
