"""FitNet's hint on the pyramid: the plainest feature distillation."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, HintLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class FitNet(LevelwiseMethod):
    """Regress the teacher's maps from the student's (FitNets, arXiv:1412.6550), see `HintLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``hint``; None is 1.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal, as FitNets do.
        adapter_init: Its start, see `make_adapter`; ``none``, which needs equal channels, leaves it out whatever
            ``always_adapt`` says.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "hint"

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        always_adapt: bool = True,
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
            levels=levels,
            missing_levels=missing_levels,
            balanced=balanced,
            warmup_steps=warmup_steps,
            decay=decay,
        )
        self.losses = nn.ModuleList(
            HintLoss(pair.student.channels, pair.teacher.channels, always_adapt=always_adapt, adapter_init=adapter_init)
            for pair in self.pairs
        )
