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
    detector.eval()
    head = detector.model.model[-1]
    last = [module for module in head.modules() if isinstance(module, nn.Conv2d) and module.bias is not None]
    hooks = [module.register_forward_pre_hook(_standardise) for module in last]
    detector.model(torch.rand(2, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    for branch in (head.cv2, getattr(head, "one2one_cv2", None) or ()) if head.reg_max == 1 else ():
        # Distances, not bins: boxes of about six cells, never inside out.
        for layers in branch:
            layers[-1].weight.mul_(0.3)
            layers[-1].bias.fill_(3.0)
    return detector


def _standardise(module: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
    """Outputs of about unit size."""
    size = inputs[0].square().mean().sqrt() * module.in_channels**0.5
    module.weight.normal_(std=1.0).div_(size)
    module.bias.zero_()
