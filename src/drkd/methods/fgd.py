"""FGD: foreground, background, attention and global relations, in the authors' proportions."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, FeatureScale, FocalGlobalLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class FGD(LevelwiseMethod):
    """Focal and global distillation (FGD, arXiv:2111.11837), see `FocalGlobalLoss`.

    The four parts are one term a level, so that their proportions stay the authors' when terms are balanced. The
    authors clip the norm of the whole gradient at 35 (``training.clip_norm`` of a recipe).

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``fgd``; None is 1.
        foreground_weight: alpha, within the term; the authors' for RetinaNet (Faster R-CNN: 5e-5).
        background_weight: beta, within the term; same (Faster R-CNN: 2.5e-5).
        attention_weight: gamma, within the term; same (Faster R-CNN: 5e-5).
        relation_weight: lambda, within the term; same (Faster R-CNN: 5e-7).
        temperature: Of the attentions, units of the feature.
        scale: ``none``, the authors', or ``teacher_rms``, which measures both maps in units of the teacher's root mean
            square, level by level, so that the attentions and the proportions do not depend on the features' size.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal (authors: only where
            they differ).
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

    term = "fgd"
    reads_boxes = True

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        temperature: float = 0.5,
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
            FocalGlobalLoss(
                pair.student.channels,
                pair.teacher.channels,
                foreground_weight=foreground_weight,
                background_weight=background_weight,
                attention_weight=attention_weight,
                relation_weight=relation_weight,
                temperature=temperature,
                scale=scale,
                always_adapt=always_adapt,
                adapter_init=adapter_init,
            )
            for pair in self.pairs
        )
