"""The graph against torchvision's own detections, in PyTorch, at batches and sizes of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder, TorchvisionDetector, wrap_torchvision
from drkd.contracts import BoxTargets, DetectionBatch, Detections, Detector, DrkdError
from drkd.export.graph import _padded, build_graph
from drkd.export.onnx_detector import suppress_outside
from drkd.export.operators import pool_regions

SHARED: dict[str, Any] = {"width": 0.25, "fpn_channels": 64, "stages": (3, 4), "score_threshold": 0.02}
BUILDERS = {
    "retinanet": RetinaNetBuilder(extra="none", **{**SHARED, "score_threshold": 0.0}),
    "fcos": FCOSBuilder(extra="none", **SHARED),
    "faster_rcnn": FasterRCNNBuilder(extra="pool", **SHARED),
}


def make_detector(family: str) -> TorchvisionDetector:
    torch.manual_seed(0)
    detector = BUILDERS[family].build(("cat", "dog", "owl")).eval()
    if family == "retinanet":
        # Its untrained scores are all low and alike, and ties have no order.
        for layer in detector.model.head.classification_head.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
    return detector


def make_batch(count: int, height: int, width: int) -> DetectionBatch:
    """Noise, the first image with a padding."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count))
    sizes = [(height - 10, width - 20), *[(height, width)] * (count - 1)]
    images[0, :, height - 10 :], images[0, :, :, width - 20 :] = 0, 0
    nothing = BoxTargets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    return DetectionBatch(images, tuple(sizes), tuple(sizes), (nothing,) * count, tuple(range(count)))


def assert_same(expected: Detections, boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
    count = int((labels >= 0).sum())
    assert count == len(expected.scores) > 0
    assert (scores[count:] == 0).all() and (labels[count:] == -1).all()
    torch.testing.assert_close(scores[:count], expected.scores)
    torch.testing.assert_close(boxes[:count], expected.boxes, rtol=0, atol=1e-3)
    assert torch.equal(labels[:count], expected.labels)


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_detections_are_those_of_the_detector(family: str) -> None:
    detector = make_detector(family)
    graph = build_graph(detector, nms=True)
    for shape in ((2, 64, 96), (1, 128, 64)):
        batch = make_batch(*shape)
        outputs = graph(batch.images, torch.tensor(batch.sizes))
        for expected, *found in zip(detector.detect(batch), *outputs, strict=True):
            assert_same(expected, *found)


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_raw_outputs_and_the_documented_suppression_give_the_same(family: str) -> None:
    detector = make_detector(family)
    batch = make_batch(2, 64, 96)
    boxes, scores = build_graph(detector, nms=False)(batch.images, torch.tensor(batch.sizes))
    assert scores.shape[-1] == 3
    least = BUILDERS[family].score_threshold
    for expected, own, values in zip(detector.detect(batch), boxes, scores, strict=True):
        found = suppress_outside(own, values, score_threshold=least, nms_threshold=0.5, detections_per_image=100)
        assert len(expected.scores) > 0
        torch.testing.assert_close(found.scores, expected.scores)
        assert torch.equal(found.labels, expected.labels)


@torch.no_grad()
def test_classes_that_the_data_lacks_leave_no_gap() -> None:
    model = make_detector("retinanet").model
    detector = wrap_torchvision(model, ["owl", "cat"], label_ids=[2, 0]).eval()
    batch = make_batch(1, 64, 96)
    (expected,) = detector.detect(batch)
    outputs = build_graph(detector, nms=True)(batch.images, torch.tensor(batch.sizes))
    assert_same(expected, *(entry[0] for entry in outputs))


def test_the_detector_is_left_as_it_is() -> None:
    detector = make_detector("retinanet")
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    graph = build_graph(detector, nms=True)
    assert all(parameter.requires_grad for parameter in detector.parameters())
    assert not {id(value) for value in graph.parameters()} & {id(value) for value in detector.parameters()}
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 1)])
def test_fixed_padding_is_tensorflows_for_even_sides(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = Conv2dSame(2, 3, kernel, stride)
    image = torch.rand(1, 2, 16, 32)
    torch.testing.assert_close(_padded(layer)(image), layer(image))


def test_pooling_is_torchvisions() -> None:
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    maps = [torch.rand(2, 4, 64, 64), torch.rand(2, 4, 32, 32), torch.rand(2, 4, 16, 16)]
    corners = torch.rand(2, 30, 2) * 100
    boxes = torch.cat([corners, corners + 2 + torch.rand(2, 30, 2).pow(3) * 400], dim=2)
    pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2)
    expected = pool({str(i): entry for i, entry in enumerate(maps)}, list(boxes), [(512, 512)] * 2)
    image = torch.arange(2).repeat_interleave(30)
    found = pool_regions(maps, boxes.reshape(-1, 4), image, [1 / 8, 1 / 16, 1 / 32], [7, 7], 2, 224.0, 4)
    torch.testing.assert_close(found, expected)


def test_another_kind_of_detector_is_refused_by_name() -> None:
    class Other(Detector):
        spec = make_detector("retinanet").spec

        def forward(self, batch, *, want):
            raise NotImplementedError

        def detect(self, batch):
            raise NotImplementedError

    with pytest.raises(DrkdError, match="got Other"):
        build_graph(Other(), nms=True)
