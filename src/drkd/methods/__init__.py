"""Distillation methods: which outputs of student and teacher feed which losses."""

from drkd.methods.combination import Combination
from drkd.methods.crosskd import CrossKD
from drkd.methods.cwd import CWD
from drkd.methods.defeat import DeFeat
from drkd.methods.drkd import DRKD, LevelRelations
from drkd.methods.drkd_presets import PaperDRKD, ReleasedDRKD
from drkd.methods.fgd import FGD
from drkd.methods.fgfi import FGFI
from drkd.methods.fitnet import FitNet
from drkd.methods.hint import FeatureHint
from drkd.methods.ld import LD
from drkd.methods.logit_kd import LogitKD
from drkd.methods.mgd import MGD
from drkd.methods.mismatched_teacher import MismatchedTeacher
from drkd.methods.nld import NLD
from drkd.methods.pkd import PKD

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
    "FeatureHint",
    "FitNet",
    "LevelRelations",
    "LogitKD",
    "MismatchedTeacher",
    "PaperDRKD",
    "ReleasedDRKD",
]
