"""CWD: where each channel fires is distilled."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, ChannelWiseLoss, FeatureScale
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class CWD(LevelwiseMethod):
    """Compare the channels' distributions over space (CWD, arXiv:2011.13256), see `ChannelWiseLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``cwd``. None is 1 with ``balanced``, else mmrazor's 10 (another port has 5 for RetinaNet).
        temperature: tau, units of the feature.
        scale: ``none``, the authors', or ``teacher_rms``, which measures both maps in units of the teacher's root mean
            square, level by level, so that the distributions do not depend on the features' size.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal (authors: only where
            they differ); not with the ``adapter_init`` ``none``.
        adapter_init: Its start, see `make_adapter`; ``default`` draws a random basis.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "cwd"
    plain_weight = 10.0

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        temperature: float = 1.0,
        scale: FeatureScale = "none",
        always_adapt: bool = False,
        adapter_init: AdapterInit = "default",
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
            ChannelWiseLoss(
                pair.student.channels,
                pair.teacher.channels,
                temperature=temperature,
                scale=scale,
                always_adapt=always_adapt,
                adapter_init=adapter_init,
            )
            for pair in self.pairs
        )
