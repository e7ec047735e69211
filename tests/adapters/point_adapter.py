"""What a user of drkd writes for `point_detector`: a factory and two functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.adapters.point_detector import PointDetector

from drkd.contracts import DetectionBatch


def build(class_names: Sequence[str], **settings: Any) -> PointDetector:
    return PointDetector(len(class_names), **settings)


def losses(model: PointDetector, batch: DetectionBatch) -> Mapping[str, Any]:
    return model.loss(batch.images, batch.boxes, [target.labels for target in batch.targets])


def detections(model: PointDetector, batch: DetectionBatch) -> Sequence[Any]:
    return model.predict(batch.images)
