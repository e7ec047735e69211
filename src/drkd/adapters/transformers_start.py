"""Weights that a detector of transformers can start to learn from, where the library's own are for loading over."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from drkd.adapters.transformers_backbone import body_of

_WIDE = 0.3
_SILENT = 0.1
_BOX_HEADS = re.compile(r"(enc_bbox_head|pre_bbox_head|bbox_embed\.\d+)$")
# Deformable DETR's, as its authors set them.
_PRIOR = 0.01
_SMALL_BOX = -2.0


def draw_start(model: Any, *, backbone: bool) -> int:
    """Draw again what the library left too small to learn from, in place.

    transformers fills most layers of these detectors, and RT-DETR's scales of batch norms too, with a normal
    distribution of standard deviation ``config.initializer_range`` (0.01). Who loads weights never notices; a detector
    that starts from them has features a thousandth of their ordinary size, and learns slowly. The authors' own code
    leaves PyTorch's defaults there, with Xavier's for the linear layers of the transformers, and its boxes start where
    their anchors are; so do ours. Deformable DETR also gets its authors' queries and priors. What else the library sets
    on purpose (zeros, priors, sampling grids) stays.

    Args:
        model: Of transformers, built from a configuration.
        backbone: Whether the backbone will start from here too. Then branches that frozen norms multiply by zero, which
            would never learn, are opened.

    Returns:
        How many layers were drawn again.
    """
    drawn = 0
    width = float(getattr(model.config, "initializer_range", None) or 0.02)
    body = body_of(model)
    # The backbone has ways of its own, and a wide convolution's default may be as small.
    inside = set(body.modules())
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.BatchNorm2d):
            if module.affine and float(module.weight.detach().abs().mean()) < _SILENT:
                nn.init.ones_(module.weight)
                drawn += 1
        elif isinstance(module, nn.Linear | nn.Conv2d) and _as_left(module, width):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            drawn += 1
    _start_boxes_at_anchors(model)
    if getattr(model.model, "query_position_embeddings", None) is not None:
        _start_deformable(model)
    if backbone:
        _open_branches(body)
    return drawn


def _as_left(layer: nn.Linear | nn.Conv2d, width: float) -> bool:
    return abs(float(layer.weight.detach().std()) / width - 1) < _WIDE


def _start_boxes_at_anchors(model: Any) -> None:
    for name, module in model.named_modules():
        if _BOX_HEADS.search(name):
            nn.init.zeros_(module.layers[-1].weight)
            nn.init.zeros_(module.layers[-1].bias)


def _start_deformable(model: Any) -> None:
    nn.init.normal_(model.model.query_position_embeddings.weight)
    for layer in model.class_embed:
        nn.init.constant_(layer.bias, -math.log((1 - _PRIOR) / _PRIOR))
    # Refining boxes layer by layer, only the first one names their size.
    nn.init.constant_(model.bbox_embed[0].layers[-1].bias[2:], _SMALL_BOX)


def _open_branches(body: nn.Module) -> None:
    for module in body.modules():
        scale = getattr(module, "weight", None)
        frozen = "Frozen" in type(module).__name__ and "Norm" in type(module).__name__
        if frozen and scale is not None and not bool(scale.any()):
            nn.init.ones_(scale)
