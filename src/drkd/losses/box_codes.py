"""Boxes from what heads predict, and how well boxes overlap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_GROWTH = abs(math.log(0.016))


def decode_offsets(offsets: Tensor, anchors: Tensor) -> Tensor:
    """Boxes from dx, dy, dw, dh (R-CNN, arXiv:1311.2524, equations 1 to 4), growth bounded by a factor of 62.5.

    Args:
        offsets: (..., 4), the centre's shift in units of the anchor's sides, and the logarithm of the sides' growth.
        anchors: (..., 4), xyxy px, broadcast.

    Returns:
        (..., 4), xyxy px; not clipped to the image.
    """
    sides = anchors[..., 2:] - anchors[..., :2]
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2 + offsets[..., :2] * sides
    halves = sides * offsets[..., 2:].clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH).exp() / 2
    return torch.cat([centres - halves, centres + halves], dim=-1)


def decode_distances(distances: Tensor, anchors: Tensor) -> Tensor:
    """Boxes from left, top, right, bottom (FCOS, arXiv:1904.01355, equation 1).

    Args:
        distances: (..., 4), from the anchor's centre to the box's sides, in units of the anchor's sides.
        anchors: (..., 4), xyxy px, broadcast.

    Returns:
        (..., 4), xyxy px.
    """
    sides = anchors[..., 2:] - anchors[..., :2]
    centres = (anchors[..., :2] + anchors[..., 2:]) / 2
    return torch.cat([centres - distances[..., :2] * sides, centres + distances[..., 2:] * sides], dim=-1)


def generalised_overlap(first: Tensor, second: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Generalised intersection over union of pairs of boxes (arXiv:1902.09630, algorithm 1).

    Args:
        first: (..., 4), xyxy px.
        second: Same shape.
        eps: Smallest union and hull, px^2.

    Returns:
        (...) in [-1, 1].
    """
    shared = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    intersection = shared.clamp_min(0.0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    union = (areas[0] + areas[1] - intersection).clamp_min(eps)
    around = hull.clamp_min(0.0).prod(dim=-1).clamp_min(eps)
    return intersection / union - (around - union) / around


def distance_overlap(first: Tensor, second: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Intersection over union less the centres' squared distance over the hull's squared diagonal (arXiv:1911.08287).

    Args:
        first: (..., 4), xyxy px.
        second: (..., 4), broadcast.
        eps: Smallest union and squared diagonal, px^2.

    Returns:
        (...) in [-1, 1].
    """
    shared = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    intersection = shared.clamp_min(0.0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    union = (areas[0] + areas[1] - intersection).clamp_min(eps)
    apart = ((first[..., :2] + first[..., 2:]) - (second[..., :2] + second[..., 2:])) / 2
    return intersection / union - apart.square().sum(dim=-1) / hull.square().sum(dim=-1).clamp_min(eps)
