"""How a torchvision detector's heads are run here: whatever mode the model is in, and without its limits."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from drkd.adapters.box_precision import exact_regions


@contextmanager
def uncut(owner: Any, *, when: bool) -> Iterator[None]:
    """Keep every detection, where some of them will be dropped: torchvision keeps the best of all classes."""
    before = owner.detections_per_img
    try:
        if when:
            owner.detections_per_img = sys.maxsize
        yield
    finally:
        owner.detections_per_img = before


@contextmanager
def heads_mode(
    model: nn.Module, features: Mapping[str, Tensor], images: ImageList, *, training: bool
) -> Iterator[None]:
    """Let a two-stage head compute losses or detections whatever mode the model is in, and at this batch's scales.

    The proposal network and the box head decide by their own ``training`` flag; their children's are left alone.
    ``MultiScaleRoIAlign`` infers its scales from the valid sizes of its first call and keeps them: they are set here
    from the padded size, and taken away afterwards.
    """
    untyped: Any = model
    rpn, heads = untyped.rpn, untyped.roi_heads
    pools: list[MultiScaleRoIAlign] = [heads.box_roi_pool, *([heads.mask_roi_pool] if heads.has_mask() else [])]
    before = rpn.training, heads.training, [(pool.scales, pool.map_levels) for pool in pools]
    try:
        rpn.training = heads.training = training
        for pool in pools:
            _set_scales(pool, features, images.tensors.shape[-2])
        with exact_regions(rpn, heads, images.tensors.device):
            yield
    finally:
        rpn.training, heads.training, kept = before
        for pool, (scales, mapper) in zip(pools, kept, strict=True):
            pool.scales, pool.map_levels = scales, mapper


def _set_scales(pool: MultiScaleRoIAlign, features: Mapping[str, Tensor], height: int) -> None:
    scales = [
        2.0 ** round(math.log2(features[name].shape[-2] / height)) for name in features if name in pool.featmap_names
    ]
    pool.scales = scales
    pool.map_levels = initLevelMapper(
        int(-math.log2(scales[0])),
        int(-math.log2(scales[-1])),
        canonical_scale=pool.canonical_scale,
        canonical_level=pool.canonical_level,
    )
