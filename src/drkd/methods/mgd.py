"""MGD: the teacher's map is generated from the student's masked one."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import MaskedGenerationLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod
from drkd.methods.term_weights import by_stages


class MGD(LevelwiseMethod):
    """Generate the teacher's maps (MGD, arXiv:2205.01529), see `MaskedGenerationLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``mgd``. None is 1 with ``balanced``, else the authors' 2e-5, for two-stage students 5e-7.
        masked_share: Share of positions that are dropped; None is the authors' 0.65, for two-stage students 0.45.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "mgd"
    plain_weight = 2e-5
    plain_two_stage = 5e-7

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        masked_share: float | None = None,
        levels: Levels | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
        decay: Decay = "none",
    ) -> None:
        super().__init__(
            student,
            teacher,
            weight=weight,
            levels=levels,
            missing_levels=missing_levels,
            balanced=balanced,
            warmup_steps=warmup_steps,
            decay=decay,
        )
        if masked_share is None:
            masked_share = by_stages(student, 0.65, 0.45)
        self.losses = nn.ModuleList(
            MaskedGenerationLoss(pair.student.channels, pair.teacher.channels, masked_share=masked_share)
            for pair in self.pairs
        )
