"""Hugging Face transformers itself: imported when first needed, and what its DETR-like models have in common."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from drkd.adapters.outer_model import describe_model
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
            f"got {describe_model(model)}" + (f" (type {kind})" if kind else "")
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


def build_model(kind: str, entries: Mapping[str, Any], *, source: str) -> nn.Module:
    """Build a detector with random weights from a configuration's entries; nothing is downloaded.

    Args:
        kind: ``config.model_type``.
        entries: Over the configuration's defaults.
        source: What the entries come from, for the message.

    Raises:
        DrkdError: If transformers is not installed, or refuses the entries.
    """
    library = import_transformers()
    try:
        config = library.AutoConfig.for_model(kind, **entries)
        model: nn.Module = library.AutoModelForObjectDetection.from_config(config)
    except Exception as error:  # entries go to code of many kinds, each with errors of its own
        reason = " ".join(str(error).split())[:300]
        raise DrkdError(f"{source}: transformers {library.__version__} builds no {kind} of this ({reason}).") from error
    return model


def check_entries(kind: str, entries: Mapping[str, Any]) -> None:
    """Refuse entries that the configuration does not have: the library would keep and never read them.

    Raises:
        DrkdError: If there is one.
    """
    known = import_transformers().AutoConfig.for_model(kind)
    for name in entries:
        if not hasattr(known, name):
            near = difflib.get_close_matches(name, [*known.to_dict(), *known.attribute_map], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DrkdError(f"config: the configuration of {kind} has no entry {name!r}.{hint}")
