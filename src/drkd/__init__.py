"""Distil object detectors with Dual Relation Knowledge Distillation (Ni et al., IJCAI 2023).

The names below are the public API. They are imported when first used, so that ``drkd --help`` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from drkd.adapters.checkpoint import load_detector
    from drkd.adapters.hooks import wrap_model
    from drkd.adapters.torchvision import wrap_torchvision
    from drkd.adapters.transformers import wrap_transformers
    from drkd.adapters.ultralytics import wrap_ultralytics
    from drkd.contracts import DetectionBatch
    from drkd.engine.balance import GradientBalance
    from drkd.engine.distiller import Distiller
    from drkd.methods import (
        CWD,
        DRKD,
        FGD,
        FGFI,
        LD,
        MGD,
        NLD,
        PKD,
        Combination,
        CrossKD,
        DeFeat,
        FeatureHint,
        FitNet,
        LogitKD,
        PaperDRKD,
        ReleasedDRKD,
    )

__all__ = [
    "CWD",
    "DRKD",
    "FGD",
    "FGFI",
    "LD",
    "MGD",
    "NLD",
    "PKD",
    "Combination",
    "CrossKD",
    "DeFeat",
    "DetectionBatch",
    "Distiller",
    "FeatureHint",
    "FitNet",
    "GradientBalance",
    "LogitKD",
    "PaperDRKD",
    "ReleasedDRKD",
    "__version__",
    "load_detector",
    "wrap_model",
    "wrap_torchvision",
    "wrap_transformers",
    "wrap_ultralytics",
]

_HOMES = {
    "CWD": "drkd.methods",
    "Combination": "drkd.methods",
    "CrossKD": "drkd.methods",
    "DRKD": "drkd.methods",
    "DeFeat": "drkd.methods",
    "DetectionBatch": "drkd.contracts",
    "Distiller": "drkd.engine.distiller",
    "FGD": "drkd.methods",
    "FGFI": "drkd.methods",
    "FeatureHint": "drkd.methods",
    "FitNet": "drkd.methods",
    "GradientBalance": "drkd.engine.balance",
    "MGD": "drkd.methods",
    "NLD": "drkd.methods",
    "PKD": "drkd.methods",
    "LD": "drkd.methods",
    "LogitKD": "drkd.methods",
    "PaperDRKD": "drkd.methods",
    "ReleasedDRKD": "drkd.methods",
    "load_detector": "drkd.adapters.checkpoint",
    "wrap_model": "drkd.adapters.hooks",
    "wrap_torchvision": "drkd.adapters.torchvision",
    "wrap_transformers": "drkd.adapters.transformers",
    "wrap_ultralytics": "drkd.adapters.ultralytics",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
