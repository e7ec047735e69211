"""FGD: foreground, background, attention and global relations, in the authors' proportions."""

from __future__ import annotations

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, FeatureScale, FocalGlobalLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod
from drkd.methods.term_weights import by_stages

# The authors' weights of the parts for RetinaNet and for Faster R-CNN.
_ONE_STAGE = {"foreground": 1e-3, "background": 5e-4, "attention": 5e-4, "relation": 5e-6}
_TWO_STAGE = {"foreground": 5e-5, "background": 2.5e-5, "attention": 5e-5, "relation": 5e-7}


class FGD(LevelwiseMethod):
    """Focal and global distillation (FGD, arXiv:2111.11837), see `FocalGlobalLoss`.

    The four parts are one term a level, so that their proportions stay the authors' when terms are balanced. The
    authors clip the norm of the whole gradient at 35 (``training.clip_norm`` of a recipe).

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``fgd``; None is 1.
        foreground_weight: alpha, within the term; None is the authors' 1e-3, for two-stage students 5e-5.
        background_weight: beta, within the term; same, 5e-4 and 2.5e-5.
        attention_weight: gamma, within the term; same, 5e-4 and 5e-5.
        relation_weight: lambda, within the term; same, 5e-6 and 5e-7.
        temperature: Of the attentions, units of the feature.
        scale: ``none``, the authors', or ``teacher_rms``, which measures both maps in units of the teacher's root mean
            square, level by level, so that the attentions and the proportions do not depend on the features' size.
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

    term = "fgd"
    reads_boxes = True

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        foreground_weight: float | None = None,
        background_weight: float | None = None,
        attention_weight: float | None = None,
        relation_weight: float | None = None,
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
        given = {
            "foreground": foreground_weight,
            "background": background_weight,
            "attention": attention_weight,
            "relation": relation_weight,
        }
        plain = by_stages(student, _ONE_STAGE, _TWO_STAGE)
        parts = {name: plain[name] if weight is None else weight for name, weight in given.items()}
        self.losses = nn.ModuleList(
            FocalGlobalLoss(
                pair.student.channels,
                pair.teacher.channels,
                foreground_weight=parts["foreground"],
                background_weight=parts["background"],
                attention_weight=parts["attention"],
                relation_weight=parts["relation"],
                temperature=temperature,
                scale=scale,
                always_adapt=always_adapt,
                adapter_init=adapter_init,
            )
            for pair in self.pairs
        )
