"""Detections to COCO metrics, and what a detector costs."""

from drkd.evaluation.coco import CocoEvaluator, CocoMetrics, detections_to_coco

__all__ = ["CocoEvaluator", "CocoMetrics", "detections_to_coco"]
