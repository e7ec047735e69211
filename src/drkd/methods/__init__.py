"""Distillation methods: which outputs of student and teacher feed which losses."""

from drkd.methods.crosskd import CrossKD
from drkd.methods.defeat import DeFeat
from drkd.methods.drkd import DRKD, LevelRelations
from drkd.methods.drkd_presets import PaperDRKD, ReleasedDRKD
from drkd.methods.hint import FeatureHint
from drkd.methods.ld import LD
from drkd.methods.logit_kd import LogitKD

__all__ = [
    "DRKD",
    "LD",
    "CrossKD",
    "DeFeat",
    "FeatureHint",
    "LevelRelations",
    "LogitKD",
    "PaperDRKD",
    "ReleasedDRKD",
]
