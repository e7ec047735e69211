"""Weights that a detector of transformers can start to learn from, where the library's own are for loading over."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from drkd.adapters.transformers_backbone import backbone_of

_WIDE = 0.3
_SILENT = 0.1


def draw_start(model: Any) -> int:
    """Draw again what the library left too small to learn from, in place.

    transformers fills most layers of these detectors, and RT-DETR's scales of batch norms too, with a
    normal distribution of standard deviation ``config.initializer_range`` (0.01). Who loads weights never notices; a
    detector that starts from them has features a thousandth of their ordinary size, and learns slowly. The authors' own
    code leaves PyTorch's defaults there, with Xavier's for the linear layers of the transformers; so do we. What the
    library sets on purpose (zeros, priors, sampling grids), and every bias, stays.

    Args:
        model: Of transformers, built from a configuration.

    Returns:
        How many layers were drawn again.
    """
    drawn = 0
    width = float(getattr(model.config, "initializer_range", None) or 0.02)
    # The backbone has ways of its own, and a wide convolution's default may be as small.
    backbone = set(backbone_of(model).modules())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine and float(module.weight.detach().abs().mean()) < _SILENT:
                nn.init.ones_(module.weight)
                drawn += 1
        elif isinstance(module, nn.Linear | nn.Conv2d) and module not in backbone and _as_left(module, width):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            drawn += 1
    return drawn


def _as_left(layer: nn.Linear | nn.Conv2d, width: float) -> bool:
    return abs(float(layer.weight.detach().std()) / width - 1) < _WIDE
