"""PKD: feature distillation by correlation, blind to magnitude."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, PearsonLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class PKD(LevelwiseMethod):
    """Compare standardised maps (PKD, arXiv:2207.02039), see `PearsonLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``pkd``. None is 1 with ``balanced``, else the authors' 10, for two-stage students 6.
        finest_levels: How many levels, finest first, are distilled (authors: 4); None is all.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal (authors: only where
            they differ); not with the ``adapter_init`` ``none``.
        adapter_init: Its start, see `make_adapter`.
        levels: Student levels to choose from, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "pkd"
    plain_weight = 10.0
    plain_two_stage = 6.0

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        finest_levels: int | None = 4,
        always_adapt: bool = False,
        adapter_init: AdapterInit = "identity",
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
            finest_levels=finest_levels,
            levels=levels,
            missing_levels=missing_levels,
            balanced=balanced,
            warmup_steps=warmup_steps,
            decay=decay,
        )
        self.losses = nn.ModuleList(
            PearsonLoss(
                pair.student.channels, pair.teacher.channels, always_adapt=always_adapt, adapter_init=adapter_init
            )
            for pair in self.pairs
        )
