"""Distillation methods: which outputs of student and teacher feed which losses."""

from drkd.methods.combination import Combination
from drkd.methods.cwd import CWD
from drkd.methods.drkd import DRKD, LevelRelations
from drkd.methods.drkd_presets import PaperDRKD, ReleasedDRKD
from drkd.methods.fgd import FGD
from drkd.methods.fgfi import FGFI
from drkd.methods.fitnet import FitNet
from drkd.methods.hint import FeatureHint
from drkd.methods.mgd import MGD
from drkd.methods.nld import NLD
from drkd.methods.pkd import PKD

__all__ = [
    "CWD",
    "DRKD",
    "FGD",
    "FGFI",
    "MGD",
    "NLD",
    "PKD",
    "Combination",
    "FeatureHint",
    "FitNet",
    "LevelRelations",
    "PaperDRKD",
    "ReleasedDRKD",
]
