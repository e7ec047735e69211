"""A teacher that sees larger images, in the pixel frame of the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from drkd.adapters import FasterRCNNBuilder, RetinaNetBuilder, SSDLiteBuilder
from drkd.adapters.resized import ResizedDetector, _scale
from drkd.contracts import DrkdError

CLASSES = ("cat", "dog", "cup")


@pytest.fixture
def retinanet():
    return RetinaNetBuilder(backbone="resnet18", width=0.125, fpn_channels=16, extra="none").build(CLASSES).eval()


def test_features_and_predictions_are_in_px_of_the_batch(retinanet, make_batch):
    batch = make_batch([(64, 96), (48, 90)])
    larger = replace(
        batch,
        images=functional.interpolate(batch.images, size=(128, 192), mode="bilinear"),
        sizes=((128, 192), (96, 180)),
        targets=tuple(replace(target, boxes=target.boxes * 2) for target in batch.targets),
    )
    resized = ResizedDetector(retinanet, scale=2.0)
    assert [level.stride for level in resized.spec.levels] == [4, 8, 16]
    want = frozenset({"features", "predictions", "assignment", "head_tail", "head_features", "losses"})
    with torch.no_grad():
        found, own = resized(batch, want=want), retinanet(larger, want=want)
    for got, expected, level in zip(found.features, own.features, resized.spec.levels, strict=True):
        torch.testing.assert_close(got.tensor, expected.tensor)
        assert (got.stride_y, got.stride_x) == (level.stride, level.stride)
    torch.testing.assert_close(found.predictions.anchors, own.predictions.anchors / 2)
    torch.testing.assert_close(found.predictions.boxes, own.predictions.boxes)
    assert torch.equal(found.assignment, own.assignment)
    tail = found.head_tail(
        list(found.head_features.classification[1]),
        list(found.head_features.regression[1]),
        after=2,
    )
    torch.testing.assert_close(tail.anchors, found.predictions.anchors)
    torch.testing.assert_close(tail.logits, found.predictions.logits)
    inside = found.head_tail.climb([level.tensor for level in found.features])
    for ours, theirs in ((inside.classification, "classification"), (inside.regression, "regression")):
        for got, expected in zip(ours, getattr(found.head_features, theirs), strict=True):
            for one, two in zip(got, expected, strict=True):
                torch.testing.assert_close(one, two)


def test_regions_are_in_px_of_the_batch(make_batch):
    builder = FasterRCNNBuilder(backbone="resnet18", width=0.125, fpn_channels=16, representation_size=16)
    detector = builder.build(CLASSES).eval()
    batch = make_batch([(64, 96)])
    larger = replace(batch, images=functional.interpolate(batch.images, size=(128, 192), mode="bilinear"))
    larger = replace(larger, sizes=((128, 192),))
    regions = [torch.tensor([[4.0, 6, 40, 50], [10, 10, 90, 60]])]
    with torch.no_grad():
        head = ResizedDetector(detector, scale=2.0)(batch, want=frozenset({"region_head"})).region_head
        own = detector(larger, want=frozenset({"region_head"})).region_head
        got, expected = head(regions), own([regions[0] * 2])
    torch.testing.assert_close(got.logits, expected.logits)
    torch.testing.assert_close(got.regions[0], regions[0])


def test_detections_are_in_px_of_the_original(retinanet, make_batch):
    batch = make_batch([(64, 96)], original_sizes=[(640, 960)])
    retinanet.model.score_thresh = 0.0
    found = ResizedDetector(retinanet, scale=0.5)(batch, want=frozenset({"features"})).features
    assert found[0].stride_y == 16
    boxes = ResizedDetector(retinanet, scale=2.0).detect(batch)[0].boxes
    assert len(boxes) and boxes[:, 2].max() <= 960 and boxes[:, 2].max() > 192


def test_a_detector_of_one_size_is_told_what_it_sees():
    inner = SSDLiteBuilder(width=0.25, size=96).build(CLASSES)
    resized = ResizedDetector(inner, scale=2.0)
    resized.expect_image_size(48)
    # 96 px of its own, twice the batch's 48: half its strides.
    assert resized.spec.levels[0].stride == pytest.approx(8)
    with pytest.raises(DrkdError, match="above 0"):
        ResizedDetector(inner, scale=0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_boxes_are_scaled_side_by_side(shape):
    boxes = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    scaled = _scale(boxes, (2.0, 0.5))
    assert scaled.dtype == torch.float64 and scaled.equal(boxes * boxes.new_tensor([2.0, 0.5, 2.0, 0.5]))
    scaled.sum().backward()
    assert boxes.grad.equal(torch.tensor([2.0, 0.5, 2.0, 0.5], dtype=torch.float64).expand(shape))
