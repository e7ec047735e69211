"""Detectors: how to build, wrap, save and load them."""

from drkd.adapters.checkpoint import SavedDetectorBuilder, load_detector, save_student
from drkd.adapters.hooked_builder import HookedBuilder
from drkd.adapters.hooks import HookedDetector, wrap_model
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
    "HookedBuilder",
    "HookedDetector",
    "RetinaNetBuilder",
    "SavedDetectorBuilder",
    "TorchvisionDetector",
    "ZooBuilder",
    "load_detector",
    "load_state",
    "save_student",
    "wrap_model",
    "wrap_torchvision",
]
