"""NLD: attention-guided features and non-local relations, in the authors' proportions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, FeatureScale, GraphNorm, NonLocalLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class NLD(LevelwiseMethod):
    """Attention-guided and non-local distillation (FKD, Zhang and Ma, ICLR 2021), see `NonLocalLoss`.

    The four parts are one term a level, so that their proportions stay the authors' when terms are balanced.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``nld``; None is 1.
        pools: Max pools inside the non-local blocks, cells a side, one a level, finest first, the last holding for all
            after it.
        reduction: Channels of a map over the width of its non-local block.
        norm: Of the non-local blocks (authors: batch, which fails on a 1x1 map of one image).
        feature_weight: Within the term, of the features under attention.
        channel_weight: Within the term, of the means over space.
        spatial_weight: Within the term, of the means over channels.
        relation_weight: Within the term, of the non-local relations.
        temperature: Of the attention, units of the feature.
        scale: ``none``, the authors', or ``teacher_rms``, which measures both maps in units of the teacher's root mean
            square, level by level, so that the attention and the proportions do not depend on the features' size.
        adapter_init: Start of the adapters on the student's side, always there, see `make_adapter`; ``default``, the
            authors', draws a random basis.
        finest_levels: How many levels, finest first, are distilled (authors: 4); None is all.
        levels: Student levels to choose from, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "nld"

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        pools: Sequence[int] = (8, 4, 2, 2),
        reduction: int = 4,
        norm: GraphNorm = "group",
        feature_weight: float = 7e-5,
        channel_weight: float = 4e-3,
        spatial_weight: float = 4e-3,
        relation_weight: float = 7e-5,
        temperature: float = 0.5,
        scale: FeatureScale = "none",
        adapter_init: AdapterInit = "default",
        finest_levels: int | None = 4,
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
        if not pools:
            raise ValueError("Expected at least one pool of the non-local blocks, got none")
        self.losses = nn.ModuleList(
            NonLocalLoss(
                pair.student.channels,
                pair.teacher.channels,
                pool=pools[min(index, len(pools) - 1)],
                reduction=reduction,
                norm=norm,
                feature_weight=feature_weight,
                channel_weight=channel_weight,
                spatial_weight=spatial_weight,
                relation_weight=relation_weight,
                temperature=temperature,
                scale=scale,
                adapter_init=adapter_init,
            )
            for index, pair in enumerate(self.pairs)
        )
