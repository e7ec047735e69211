"""Hugging Face transformers itself: imported when first needed, and what its DETR-like models have in common."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from drkd.contracts import DrkdError


@dataclass(frozen=True)
class DetrFamily:
    """What sets one of transformers' multi-scale detectors apart.

    Args:
        losses: Kinds of loss that each group of decoder queries gets.
        flat: Whether the encoder returns one row of all levels' positions (Deformable DETR), not one map a level.
        processor: The image processor whose post-processing belongs to it.
    """

    losses: tuple[str, ...]
    flat: bool = False
    processor: str = "RTDetrImageProcessor"


FAMILIES = {
    "rt_detr": DetrFamily(("vfl", "bbox", "giou")),
    "rt_detr_v2": DetrFamily(("vfl", "bbox", "giou")),
    "d_fine": DetrFamily(("vfl", "bbox", "giou", "fgl", "ddf")),
    "deimv2": DetrFamily(("mal", "bbox", "giou", "fgl", "ddf")),
    "deformable_detr": DetrFamily(("ce", "bbox", "giou"), flat=True, processor="DeformableDetrImageProcessor"),
}
"""The detectors that are supported, by transformers' ``config.model_type``."""


def import_transformers() -> Any:
    """The library.

    Raises:
        DrkdError: If it, or SciPy, which its losses match boxes with, is not installed.
    """
    try:
        importlib.import_module("scipy.optimize")
        return importlib.import_module("transformers")
    except ImportError as error:
        raise DrkdError(
            f"Detectors of Hugging Face transformers need an extra that is not installed: "
            f"pip install 'drkd[transformers]' ({error})."
        ) from error


def family_of(model: nn.Module) -> str:
    """The model's ``config.model_type``.

    Raises:
        ValueError: If it is no detector of transformers with a multi-scale encoder.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    if kind not in FAMILIES or not type(model).__name__.endswith("ForObjectDetection"):
        raise ValueError(
            f"expected a ...ForObjectDetection model of transformers with one of the types {', '.join(FAMILIES)}, "
            f"got {type(model).__name__}" + (f" (type {kind})" if kind else "")
        )
    return kind


def check_family(kind: str, *, source: str) -> None:
    """Say that a type is not supported before anything is loaded or built.

    Raises:
        DrkdError: If it is none of `FAMILIES`.
    """
    if kind not in FAMILIES:
        raise DrkdError(
            f"{source}: expected a detector with a multi-scale encoder, of one of the types {', '.join(FAMILIES)}, got "
            f"{kind!r}. DETR, Conditional DETR and YOLOS have no pyramid to distil."
        )
