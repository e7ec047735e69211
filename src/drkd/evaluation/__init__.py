"""Detections to COCO metrics, and what a detector costs."""

from drkd.evaluation.coco import CocoEvaluator, CocoMetrics, detections_to_coco
from drkd.evaluation.cost import ModelCost, measure_cost

__all__ = ["CocoEvaluator", "CocoMetrics", "ModelCost", "detections_to_coco", "measure_cost"]
