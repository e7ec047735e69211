"""Detectors: how to build, wrap, save and load them."""

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
    "RetinaNetBuilder",
    "TorchvisionDetector",
    "ZooBuilder",
    "load_state",
    "wrap_torchvision",
]
