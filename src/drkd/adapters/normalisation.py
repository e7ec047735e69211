"""Normalise a padded batch as a detector's own transform would, and leave the padding black after it."""

from __future__ import annotations

import torch
from torch import Tensor

from drkd.contracts import DetectionBatch


def normalise_images(batch: DetectionBatch, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract the mean, divide by the deviation and set the padding back to zero, without waiting for the device.

    Args:
        batch: The images, RGB in [0, 1].
        mean: (1, 3, 1, 1).
        std: Same.

    Returns:
        (B, 3, H, W) in the images' dtype.
    """
    images = batch.images
    height, width = batch.image_size
    values = (images - mean.to(images.dtype)) / std.to(images.dtype)
    if any(size != (height, width) for size in batch.sizes):
        sizes = torch.tensor(batch.sizes).to(images.device, non_blocking=True)
        rows = torch.arange(height, device=images.device) < sizes[:, :1]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        values = values * (rows[:, None, :, None] & columns[:, None, None, :])
    return values
