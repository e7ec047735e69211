"""Suppression and pooling as operators of known output shapes, for eager PyTorch and for ONNX alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms, roi_align

OPSET = 18


@torch.library.custom_op("drkd::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    """Set the scores of suppressed boxes to zero, separately for every image and group.

    ONNX's operator returns indices, as many as are kept, and a graph of such sizes is hard to export; this one puts the
    kept scores back where they were.

    Args:
        boxes: (B, N, 4), xyxy px.
        scores: (B, G, N), of each group; 0 takes a box out of a group.
        iou: A box is suppressed by a better one of its group that overlaps it by more than this.
        most: At most so many boxes are kept in a group.

    Returns:
        (B, G, N).
    """
    kept = torch.zeros_like(scores)
    for image, groups in enumerate(scores):
        for group, values in enumerate(groups):
            candidates = torch.where(values > 0)[0]
            chosen = candidates[nms(boxes[image, candidates], values[candidates], iou)[:most]]
            kept[image, group, chosen] = values[chosen]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float, most: int) -> Tensor:
    del boxes, iou, most
    return torch.empty_like(scores)


@torch.library.custom_op("drkd::pool_regions", mutates_args=())
def pool_regions(
    maps: Sequence[Tensor],
    regions: Tensor,
    image: Tensor,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    """Pool every region from the level of its size: torchvision's ``MultiScaleRoIAlign``, equation 1 of the FPN paper.

    Args:
        maps: (B, C, h, w), finest first.
        regions: (R, 4), xyxy px.
        image: (R,) int64, the image of each region.
        scales: Of each map, its cells a px.
        output_size: Height and width of what is pooled.
        sampling_ratio: Samples of a cell, each way.
        canonical_scale: Side of a region that belongs to the canonical level, px.
        canonical_level: Exponent of that level's stride.

    Returns:
        (R, C, height, width).
    """
    rows = torch.cat([image[:, None].to(regions.dtype), regions], dim=1)
    finest, coarsest = _exponents(scales)
    sides = ((regions[:, 2] - regions[:, 0]) * (regions[:, 3] - regions[:, 1])).sqrt()
    levels = torch.floor(canonical_level + torch.log2(sides / canonical_scale) + 1e-6).clamp(finest, coarsest) - finest
    pooled = regions.new_zeros((regions.shape[0], maps[0].shape[1], *output_size))
    for index, (entry, scale) in enumerate(zip(maps, scales, strict=True)):
        own = torch.where(levels == index)[0]
        pooled[own] = roi_align(entry, rows[own], tuple(output_size), scale, sampling_ratio)
    return pooled


@pool_regions.register_fake
def _(
    maps: Sequence[Tensor],
    regions: Tensor,
    image: Tensor,
    scales: Sequence[float],
    output_size: Sequence[int],
    sampling_ratio: int,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    del image, scales, sampling_ratio, canonical_scale, canonical_level
    return regions.new_empty((regions.shape[0], maps[0].shape[1], *output_size))


def _exponents(scales: Sequence[float]) -> tuple[int, int]:
    return -round(math.log2(scales[0])), -round(math.log2(scales[-1]))


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` is to write for the operators of this module."""
    from onnxscript import opset18

    # Its types know tensors of numbers, not the values that stand for them here.
    op: Any = opset18

    def number(value: float) -> Any:
        return op.Constant(value_float=float(value))

    def write_suppress(boxes: Any, scores: Any, iou: float, most: int) -> Any:
        selected = op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[0.0]),
        )
        return op.ScatterND(op.Mul(scores, number(0.0)), selected, op.GatherND(scores, selected))

    def write_pool(
        maps: Sequence[Any],
        regions: Any,
        image: Any,
        scales: Sequence[float],
        output_size: Sequence[int],
        sampling_ratio: int,
        canonical_scale: float,
        canonical_level: int,
    ) -> Any:
        left, top, right, bottom = op.Split(regions, axis=1, num_outputs=4)
        area = op.Mul(op.Sub(right, left), op.Sub(bottom, top))
        size = op.Div(op.Log(op.Div(op.Sqrt(area), number(canonical_scale))), number(math.log(2.0)))
        finest, coarsest = _exponents(scales)
        level = op.Clip(op.Floor(op.Add(size, number(canonical_level + 1e-6))), number(finest), number(coarsest))
        flat = op.Squeeze(level, op.Constant(value_ints=[1]))
        pooled, places = [], []
        for index, (entry, scale) in enumerate(zip(maps, scales, strict=True)):
            own = op.Squeeze(op.NonZero(op.Equal(flat, number(finest + index))), op.Constant(value_ints=[0]))
            places.append(own)
            pooled.append(
                op.RoiAlign(
                    entry,
                    op.Gather(regions, own, axis=0),
                    op.Gather(image, own, axis=0),
                    coordinate_transformation_mode="output_half_pixel",
                    output_height=output_size[0],
                    output_width=output_size[1],
                    sampling_ratio=max(0, sampling_ratio),
                    spatial_scale=scale,
                )
            )
        if len(pooled) == 1:
            return pooled[0]
        joined, order = op.Concat(*pooled, axis=0), op.Concat(*places, axis=0)
        # Row i of what is joined belongs to region order[i]: the inverse of a permutation puts it there.
        count = op.Shape(order)
        _, back = op.TopK(order, count, axis=0, largest=0, sorted=1)
        return op.Gather(joined, back, axis=0)

    return {
        torch.ops.drkd.suppress.default: write_suppress,
        torch.ops.drkd.pool_regions.default: write_pool,
    }
