"""Small YOLOs for the tests that need one which detects something."""

from __future__ import annotations

import torch
from torch import nn

from drkd.adapters import UltralyticsBuilder, UltralyticsDetector

CLASSES = ("cat", "dog", "cup")


def build_yolo(name: str = "yolo11n.yaml", classes: tuple[str, ...] = CLASSES, **options) -> UltralyticsDetector:
    """A YOLO with the same fresh weights at every call."""
    torch.manual_seed(0)
    return UltralyticsBuilder(model=name, **options).build(classes)


@torch.no_grad()
def lively(detector: UltralyticsDetector) -> UltralyticsDetector:
    """Norms that fit noise, and outputs that differ from place to place: an untrained model that detects something."""
    torch.manual_seed(1)
    norms = [module for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    detector.model.train()(torch.rand(2, 3, 64, 64))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module in detector.model.model[-1].modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.weight.normal_(std=0.2)
            module.bias.fill_(0.5)
    return detector.eval()
