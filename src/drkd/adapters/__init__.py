"""Detectors: how to build, wrap, save and load them."""

from drkd.adapters.checkpoint import SavedDetectorBuilder, load_detector, save_student
from drkd.adapters.mmdetection import MMDetectionBuilder
from drkd.adapters.torchvision import (
    FasterRCNNBuilder,
    FCOSBuilder,
    RetinaNetBuilder,
    TorchvisionDetector,
    ZooBuilder,
    wrap_torchvision,
)
from drkd.adapters.weights import load_state

__all__ = [
    "FCOSBuilder",
    "FasterRCNNBuilder",
    "MMDetectionBuilder",
    "RetinaNetBuilder",
    "SavedDetectorBuilder",
    "TorchvisionDetector",
    "ZooBuilder",
    "load_detector",
    "load_state",
    "save_student",
    "wrap_torchvision",
]
