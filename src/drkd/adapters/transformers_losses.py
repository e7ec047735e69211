"""The named losses of a transformers detector: what its own criterion computed, in a few names that never change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from drkd.adapters.transformers_library import FAMILIES

_LAYER = re.compile(r"_(aux_|dn_)?\d+$")


def group_losses(model: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight the criterion's parts as the library does and sum them by kind and by the queries they belong to.

    ``loss_bbox`` is the last decoder layer's, ``loss_bbox_auxiliary`` the sum over the other layers and the encoder's
    proposals, ``loss_bbox_denoising`` the sum over the layers for the denoising queries. The sum of all is the model's
    ``loss``. A loss that a batch without boxes, or eval mode, leaves out is there as a zero, and in training carries a
    zero gradient for the parameters that only denoising uses, which data-parallel training waits for.

    Args:
        model: The detector.
        found: Its ``loss_dict``.
    """
    untyped: Any = model
    config = untyped.config
    family = FAMILIES[config.model_type]
    # Deformable DETR reports its losses unweighted, with a count that is none; the others weight them already.
    weights = {"loss_ce": 1.0}
    weights |= {name: getattr(config, f"{name[5:]}_loss_coefficient", 1.0) for name in ("loss_bbox", "loss_giou")}
    kinds = [f"loss_{kind}" for kind in family.losses]
    losses: dict[str, Tensor] = {}
    for name, value in found.items():
        layer = _LAYER.search(name)
        kind = name[: layer.start()] if layer else name
        if kind not in kinds:
            continue
        group = "" if layer is None else "_denoising" if layer[1] == "dn_" else "_auxiliary"
        weighted = value * weights[kind] if family.flat else value
        losses[kind + group] = losses[kind + group] + weighted if kind + group in losses else weighted
    denoises = not family.flat and config.num_denoising > 0 and config.auxiliary_loss
    like = next(iter(losses.values()))
    expected = [f"{kind}_auxiliary" for kind in kinds] if config.auxiliary_loss else []
    expected += [f"{kind}_denoising" for kind in kinds] if denoises else []
    absent = [name for name in expected if name not in losses]
    losses |= {name: like.new_zeros(()) for name in absent}
    if denoises and model.training and f"{kinds[0]}_denoising" in absent:
        losses[f"{kinds[0]}_denoising"] = untyped.model.denoising_class_embed.weight.sum() * 0
    return losses
