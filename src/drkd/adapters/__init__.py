"""Detectors: how to build, wrap, save and load them."""

from drkd.adapters.checkpoint import SavedDetectorBuilder, load_detector, save_student
from drkd.adapters.hooked_builder import HookedBuilder
from drkd.adapters.hooks import HookedDetector, wrap_model
from drkd.adapters.mask_rcnn import MaskRCNNBuilder
from drkd.adapters.mmdetection import MMDetectionBuilder
from drkd.adapters.ssd import SSD300Builder, SSDLiteBuilder
from drkd.adapters.torchvision import (
    FasterRCNNBuilder,
    FCOSBuilder,
    RetinaNetBuilder,
    TorchvisionDetector,
    ZooBuilder,
    wrap_torchvision,
)
from drkd.adapters.transformers import (
    DetrBuilder,
    PretrainedDetrBuilder,
    TransformersDetector,
    wrap_transformers,
)
from drkd.adapters.ultralytics import UltralyticsBuilder, UltralyticsDetector, wrap_ultralytics
from drkd.adapters.weights import load_state

__all__ = [
    "DetrBuilder",
    "FCOSBuilder",
    "FasterRCNNBuilder",
    "HookedBuilder",
    "HookedDetector",
    "MMDetectionBuilder",
    "MaskRCNNBuilder",
    "PretrainedDetrBuilder",
    "RetinaNetBuilder",
    "SSD300Builder",
    "SSDLiteBuilder",
    "SavedDetectorBuilder",
    "TorchvisionDetector",
    "TransformersDetector",
    "UltralyticsBuilder",
    "UltralyticsDetector",
    "ZooBuilder",
    "load_detector",
    "load_state",
    "save_student",
    "wrap_model",
    "wrap_torchvision",
    "wrap_transformers",
    "wrap_ultralytics",
]
