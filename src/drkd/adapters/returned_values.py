"""What a user's functions return, checked once and turned into plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drkd.contracts import DrkdError


def read_loss(name: str, value: Any) -> Tensor:
    """One 0-d tensor of a loss, which may be a list of them (one a level).

    Raises:
        DrkdError: If it is neither.
    """
    parts = list(value) if isinstance(value, list | tuple) else [value]
    if not parts or not all(isinstance(part, Tensor) and part.numel() == 1 for part in parts):
        got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        raise DrkdError(f"losses: expected {name!r} to be one number or a list of them (0-d tensors), got {got}.")
    scalars = [part.reshape(()) for part in parts]
    return scalars[0] if len(scalars) == 1 else torch.stack(scalars).sum()


def read_detections(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), scores (N,) and labels (N,) of an image, from a tuple, a mapping or an object.

    Raises:
        DrkdError: If they are not there, or of other shapes.
    """
    names = ("boxes", "scores", "labels")
    if isinstance(found, Mapping):
        parts = [found.get(name) for name in names]
    elif isinstance(found, tuple | list) and len(found) == 3:
        parts = list(found)
    else:
        parts = [getattr(found, name, None) for name in names]
    boxes, scores, labels = parts
    if (
        isinstance(boxes, Tensor)
        and isinstance(scores, Tensor)
        and isinstance(labels, Tensor)
        and boxes.ndim == 2
        and boxes.shape == (len(scores), 4)
        and scores.shape == labels.shape == (len(boxes),)
    ):
        return boxes, scores, labels
    got = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    raise DrkdError(
        "detections: expected boxes (N, 4), scores (N,) and labels (N,) of each image, as a tuple, a mapping or an "
        f"object with these names, got {got}."
    )
