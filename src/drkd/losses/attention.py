"""Attention of a map: where, and in which channels, its magnitudes lie."""

from __future__ import annotations

from torch import Tensor


def spatial_attention(feature: Tensor, *, temperature: float) -> Tensor:
    r"""Where a map is loud: :math:`H W \cdot \mathrm{softmax}_{HW}(\mathrm{mean}_c |x| / T)` (FGD, section 3.1; FKD).

    Args:
        feature: (B, C, H, W), at least float32.
        temperature: T, units of the feature, > 0.

    Returns:
        (B, 1, H, W), mean 1 over the positions of each image.
    """
    magnitude = feature.abs().mean(dim=1, keepdim=True)
    share = (magnitude.flatten(1) / temperature).softmax(dim=1)
    return (share.shape[1] * share).view_as(magnitude)


def channel_attention(feature: Tensor, *, temperature: float) -> Tensor:
    r"""Which channels are loud: :math:`C \cdot \mathrm{softmax}_C(\mathrm{mean}_{HW} |x| / T)` (FGD, section 3.1).

    Args:
        feature: (B, C, H, W), at least float32.
        temperature: T, units of the feature, > 0.

    Returns:
        (B, C, 1, 1), mean 1 over the channels of each image.
    """
    magnitude = feature.abs().mean(dim=(2, 3), keepdim=True)
    return feature.shape[1] * (magnitude / temperature).softmax(dim=1)
