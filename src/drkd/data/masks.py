"""COCO segmentations: packed as run lengths when a file is read, turned into pixels when an image is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from drkd.contracts import PackedMask, Size

_SMALLEST_POLYGON = 6


def pack_segmentation(value: object, size: Size) -> PackedMask | str:
    """Compressed run lengths of a COCO ``segmentation``, or what is wrong with it.

    Args:
        value: A list of polygons (x, y, x, y, ... in px), or an object with ``size`` and ``counts``.
        size: Height and width of the image, px.
    """
    height, width = size
    if isinstance(value, list):
        polygons = [list(entry) for entry in value if isinstance(entry, list)]
        wrong = [entry for entry in polygons if len(entry) % 2 or not _are_numbers(entry)]
        usable = [entry for entry in polygons if len(entry) >= _SMALLEST_POLYGON]
        if len(polygons) != len(value) or wrong or not usable:
            return "expected polygons [[x, y, x, y, x, y, ...], ...] of at least three corners each"
        # A corner far outside would take the rasteriser a point for each px on the way there.
        inside = [_clip(entry, size) for entry in usable]
        parts: list[Any] = coco_mask.frPyObjects(inside, height, width)
        return PackedMask(size, bytes(_counts(coco_mask.merge(parts))))
    if not isinstance(value, dict) or value.get("size") not in ([height, width], (height, width)):
        return f"expected polygons, or run lengths with size [{height}, {width}]"
    counts = value.get("counts")
    # The library takes them for what they are not where they are negative or fractions.
    whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if isinstance(counts, list) and whole and sum(counts) == height * width:
        return PackedMask(size, bytes(_counts(coco_mask.frPyObjects(value, height, width))))
    if isinstance(counts, str | bytes) and counts:
        packed = PackedMask(size, counts.encode() if isinstance(counts, str) else counts)
        # Nothing but decoding shows whether they are whole; an epoch must not end on them.
        return packed if _can_be_decoded(packed) else "its compressed run lengths are damaged, or of another image"
    return f"expected run lengths that add up to {height * width} px"


def unpack_masks(masks: Sequence[PackedMask | None], size: Size) -> Tensor:
    """(N, H, W) bool; an entry of None is empty."""
    found = np.zeros((len(masks), *size), dtype=np.uint8)
    for place, mask in zip(found, masks, strict=True):
        if mask is not None:
            place[:] = coco_mask.decode({"size": list(mask.size), "counts": mask.counts})
    return torch.from_numpy(found).bool()


def _can_be_decoded(mask: PackedMask) -> bool:
    try:
        coco_mask.decode({"size": list(mask.size), "counts": mask.counts})
    except (ValueError, RuntimeError):
        return False
    return True


def _clip(corners: Sequence[float], size: Size) -> list[float]:
    """Corners x, y, x, y, ... no further outside than the image is large."""
    height, width = size
    limits = (width, height)
    return [min(max(value, -limits[place % 2]), 2 * limits[place % 2]) for place, value in enumerate(corners)]


def _counts(packed: Any) -> bytes:
    counts = packed["counts"]
    return counts.encode() if isinstance(counts, str) else bytes(counts)


def _are_numbers(values: Sequence[object]) -> bool:
    return all(type(value) in (int, float) and abs(value) < 1e9 for value in values)  # type: ignore[arg-type]
