"""Distillation methods: which outputs of student and teacher feed which losses."""

from drkd.methods.drkd import DRKD, LevelRelations
from drkd.methods.drkd_presets import PaperDRKD, ReleasedDRKD
from drkd.methods.hint import FeatureHint

__all__ = ["DRKD", "FeatureHint", "LevelRelations", "PaperDRKD", "ReleasedDRKD"]
