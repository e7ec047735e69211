"""Tiny detectors and batches for the adapters' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from drkd.adapters import FasterRCNNBuilder, FCOSBuilder, RetinaNetBuilder
from drkd.adapters.torchvision import PyramidBuilder
from drkd.contracts import BoxTargets, DetectionBatch, Size

sys.path.insert(0, str(Path(__file__).parent))
CLASSES = ("cat", "dog", "cup")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_batch() -> Callable[..., DetectionBatch]:
    """A batch of random images of the given valid sizes, padded to multiples of 32."""

    def make(sizes: Sequence[Size], *, boxes: int = 3, original_sizes: Sequence[Size] | None = None) -> DetectionBatch:
        height, width = (-(-max(size[axis] for size in sizes) // 32) * 32 for axis in (0, 1))
        images = torch.zeros(len(sizes), 3, height, width)
        targets = []
        for index, (h, w) in enumerate(sizes):
            images[index, :, :h, :w] = torch.rand(3, h, w)
            corners = torch.rand(boxes, 4) * torch.tensor([w / 2, h / 2, w / 2, h / 2])
            corners[:, 2:] += corners[:, :2] + 1
            targets.append(
                BoxTargets(corners, torch.arange(boxes) % len(CLASSES), torch.zeros(boxes, dtype=torch.bool))
            )
        return DetectionBatch(
            images, tuple(sizes), tuple(original_sizes or sizes), tuple(targets), tuple(range(len(sizes)))
        )

    return make


@pytest.fixture(params=["retinanet", "fcos", "faster_rcnn"])
def builder(request: pytest.FixtureRequest) -> PyramidBuilder:
    """One small builder a family; scores are not cut off, so that untrained models detect something."""
    if request.param == "faster_rcnn":
        return FasterRCNNBuilder(
            backbone="resnet18",
            width=0.25,
            fpn_channels=16,
            representation_size=32,
            score_threshold=0.0,
            anchor_sizes=((8,), (16,), (32,), (64,), (96,)),
        )
    kind = {"retinanet": RetinaNetBuilder, "fcos": FCOSBuilder}[request.param]
    sizes = ((8,), (16,), (32,)) if request.param == "fcos" else ((12, 16), (24, 32), (48, 64))
    return kind(backbone="resnet18", width=0.25, fpn_channels=64, extra="none", score_threshold=0.0, anchor_sizes=sizes)
