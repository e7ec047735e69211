"""Measure a detector: COCO numbers on a split, and on request what it costs to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from drkd.contracts import DetectionBatch, Detector
from drkd.data.dataset import DatasetSplit
from drkd.evaluation import CocoEvaluator, CocoMetrics, ModelCost, measure_cost


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    Args:
        coco: The twelve numbers.
        metrics: The same as plain values, with thresholds and per-class AP.
        cost: Parameters, FLOPs and latency as plain values, where asked for.
    """

    coco: CocoMetrics
    metrics: dict[str, Any]
    cost: dict[str, Any] | None = None


@torch.no_grad()
def evaluate_detector(
    detector: Detector,
    split: DatasetSplit,
    *,
    loader: Iterable[DetectionBatch],
    area_scale: float = 1.0,
    cost: bool = False,
    device: torch.device | str = "cpu",
) -> Evaluated:
    """Run a detector over a split and score it.

    Args:
        detector: Any detector; put into eval mode.
        split: Ground truth.
        loader: Batches of that split, every image once.
        area_scale: Factor on COCO's area limits.
        cost: Measure parameters, FLOPs and latency at the first batch's image size, on the CPU.
        device: Where to run.
    """
    detector.eval().to(device)
    evaluator = CocoEvaluator(split.records, split.class_names, area_scale=area_scale)
    image_size = None
    for batch in loader:
        image_size = image_size or batch.image_size
        evaluator.update(batch.image_ids, detector.detect(batch.to(device)))
    coco = evaluator.compute()
    measured: ModelCost | None = None
    if cost and image_size is not None:
        measured = measure_cost(detector.model, image_size)
    return Evaluated(coco, coco.as_json(), None if measured is None else measured.as_json())
