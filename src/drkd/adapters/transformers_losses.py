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
    ``loss``. Denoising losses are there, as zeros, where a batch has no box or the model is in eval mode, and then
    carry a zero gradient for the parameters that only they use, which data-parallel training waits for.

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
    if not family.flat and config.num_denoising > 0 and config.auxiliary_loss and f"{kinds[0]}_denoising" not in losses:
        like = next(iter(losses.values()))
        zero = untyped.model.denoising_class_embed.weight.sum() * 0 if model.training else like.new_zeros(())
        losses |= {f"{kind}_denoising": zero if kind == kinds[0] else like.new_zeros(()) for kind in kinds}
    return losses
