"""Plain feature imitation, the control that DRKD has to beat: FitNet's hint, or a standardised one like PKD's."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import HintLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class FeatureHint(LevelwiseMethod):
    """Compare the maps of each pyramid level as they are.

    ``standardise=True`` gives each channel zero mean and unit variance over batch and space first, as PKD does (Cao et
    al., NeurIPS 2022, arXiv:2207.02039): half the mean squared difference. False is FitNet's hint (Romero et al., ICLR
    2015, arXiv:1412.6550): the mean squared difference. Maps of unequal size are compared at the teacher's.

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        weight: Of the term ``hint``.
        standardise: See above.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal (FitNet does, PKD
            does not). Where they differ there is always one.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If the weight is not above 0.
    """

    term = "hint"

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float = 1.0,
        standardise: bool = True,
        always_adapt: bool = False,
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
        self.losses = nn.ModuleList(
            HintLoss(pair.student.channels, pair.teacher.channels, always_adapt=always_adapt, standardised=standardise)
            for pair in self.pairs
        )
