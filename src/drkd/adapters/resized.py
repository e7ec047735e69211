"""A teacher that sees its images larger or smaller than the student does, in the student's pixel frame all the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from drkd.adapters.torchvision_detector import scale_spec
from drkd.contracts import (
    BoxTargets,
    DensePredictions,
    DetectionBatch,
    Detections,
    Detector,
    DetectorOutput,
    DrkdError,
    HeadFeatures,
    HeadTail,
    RegionHead,
    RegionPredictions,
    Want,
)


class ResizedDetector(Detector):
    """Shows another detector the batch at another scale, and reports what it finds in px of the batch.

    Strides are those of the batch: a teacher that sees images twice as large has levels at half its own strides.

    Args:
        detector: The detector, kept as it is.
        scale: Sides of the images that it sees over those of the batch.
        size_divisor: The sides are rounded to multiples of it, px, at least one.

    Raises:
        DrkdError: If the scale is not positive.
    """

    def __init__(self, detector: Detector, *, scale: float, size_divisor: int = 32) -> None:
        super().__init__()
        if scale <= 0:
            raise DrkdError(f"teacher_size: expected a scale above 0, got {scale}.")
        self.inner = detector
        self.model = detector.model
        self.scale = scale
        self.size_divisor = size_divisor
        self.spec = scale_spec(detector.spec, 1 / scale)

    @property
    def body_names(self) -> tuple[str, ...]:
        """The detector's own."""
        return self.inner.body_names

    @property
    def can_detect(self) -> bool:
        """As the detector."""
        return self.inner.can_detect

    def expect_image_size(self, side: int) -> None:
        """Pass the side on as the detector sees it."""
        self.inner.expect_image_size(max(1, round(side * self.scale)))
        self.spec = scale_spec(self.inner.spec, 1 / self.scale)

    def forward(self, batch: DetectionBatch, *, want: frozenset[Want]) -> DetectorOutput:
        """What the detector computes for the resized batch, in px of this one."""
        resized = self._resize(batch)
        height, width = batch.image_size
        y, x = resized.image_size[0] / height, resized.image_size[1] / width
        found: DetectorOutput = self.inner(resized, want=want)
        features = tuple(
            replace(entry, stride_y=height / entry.tensor.shape[-2], stride_x=width / entry.tensor.shape[-1])
            for entry in found.features
        )
        factors = x, y
        return replace(
            found,
            features=features,
            predictions=None if found.predictions is None else _shrink(found.predictions, factors),
            head_tail=None if found.head_tail is None else _Tail(found.head_tail, factors),
            regions=None if found.regions is None else _shrink_regions(found.regions, factors),
            region_head=None if found.region_head is None else _RegionHead(found.region_head, factors),
        )

    @torch.no_grad()
    def detect(self, batch: DetectionBatch) -> list[Detections]:
        """Detections in px of the original images."""
        return self.inner.detect(self._resize(batch))

    def _resize(self, batch: DetectionBatch) -> DetectionBatch:
        height, width = (
            max(1, round(side * self.scale / self.size_divisor)) * self.size_divisor for side in batch.image_size
        )
        if (height, width) == batch.image_size:
            return batch
        y, x = height / batch.image_size[0], width / batch.image_size[1]
        images = functional.interpolate(
            batch.images, size=(height, width), mode="bilinear", align_corners=False, antialias=y < 1 or x < 1
        )
        targets = tuple(
            BoxTargets(_scale(target.boxes, (x, y)), target.labels, target.ignore) for target in batch.targets
        )
        sizes = tuple((max(1, round(h * y)), max(1, round(w * x))) for h, w in batch.sizes)
        return replace(batch, images=images, sizes=sizes, targets=targets)


def _scale(boxes: Tensor, factors: tuple[float, float]) -> Tensor:
    # By numbers: a tensor of them would be copied to the device, which the host waits for.
    x, y = factors
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack((left * x, top * y, right * x, bottom * y), dim=-1)


def _back(factors: tuple[float, float]) -> tuple[float, float]:
    return 1 / factors[0], 1 / factors[1]


def _shrink(found: DensePredictions, factors: tuple[float, float]) -> DensePredictions:
    # Codes are in units of the anchors' sides, and so the same in every frame.
    return replace(found, anchors=_scale(found.anchors, _back(factors)))


def _shrink_regions(found: RegionPredictions, factors: tuple[float, float]) -> RegionPredictions:
    return replace(found, regions=tuple(_scale(entry, _back(factors)) for entry in found.regions))


class _Tail:
    """A `HeadTail` whose anchors are in px of the student's batch."""

    def __init__(self, tail: HeadTail, factors: tuple[float, float]) -> None:
        self._tail = tail
        self._factors = factors

    def __call__(
        self, classification: Sequence[Tensor], regression: Sequence[Tensor], *, after: int
    ) -> DensePredictions:
        return _shrink(self._tail(classification, regression, after=after), self._factors)

    def climb(self, maps: Sequence[Tensor]) -> HeadFeatures:
        """The head's branches on pyramid maps."""
        return self._tail.climb(maps)


class _RegionHead:
    """A `RegionHead` that takes regions in px of the student's batch."""

    def __init__(self, head: RegionHead, factors: tuple[float, float]) -> None:
        self._head = head
        self._factors = factors

    def __call__(self, regions: Sequence[Tensor]) -> RegionPredictions:
        found = self._head([_scale(entry, self._factors) for entry in regions])
        return replace(found, regions=tuple(entry.detach() for entry in regions))
