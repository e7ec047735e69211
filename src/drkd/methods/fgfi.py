"""FGFI: the student imitates the teacher near objects, as anchors see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from drkd.contracts import Decay, DetectorSpec
from drkd.losses import AdapterInit, AnchorStyle, FineGrainedLoss
from drkd.methods.levels import Levels, MissingLevels
from drkd.methods.levelwise import LevelwiseMethod


class FGFI(LevelwiseMethod):
    """Fine-grained feature imitation (FGFI, arXiv:1906.03609), see `FineGrainedLoss`.

    The anchors are made from the levels' strides; they need not be those of the detectors.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``fgfi``. None is 1 with ``balanced``, else the authors' 0.01.
        assignment: ``size`` gives each box to the coarsest level whose stride is at most its size /
            ``size_per_stride``, or to the finest; ``all`` gives every box to every level.
        size_per_stride: See above; 14 is a 56 px box on the level of stride 4.
        scales: Sides of the anchors, strides of the level.
        ratios: Heights over widths of the anchors.
        threshold: Share of a box's largest IoU that a position's anchor must surpass.
        anchor_style: See `level_anchors`.
        activation: ReLU after the 3x3 convolution on the student's side, as the authors have it on one backbone map.
        adapter_init: Start of that convolution, see `make_adapter`; ``default``, the authors', draws a random basis.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    term = "fgfi"
    plain_weight = 0.01
    reads_boxes = True

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        assignment: Literal["size", "all"] = "size",
        size_per_stride: float = 14.0,
        scales: Sequence[float] = (8.0,),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        threshold: float = 0.5,
        anchor_style: AnchorStyle = "centred",
        activation: bool = False,
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
        if assignment not in ("size", "all"):
            raise ValueError(f"Expected an assignment out of size, all, got {assignment!r}")
        self.minimum_boxes = {"fgfi": 1}
        steps = sorted({pair.student.stride for pair in self.pairs}) if assignment == "size" else []
        self.losses = nn.ModuleList(
            FineGrainedLoss(
                pair.student.channels,
                pair.teacher.channels,
                scales=scales,
                ratios=ratios,
                threshold=threshold,
                anchor_style=anchor_style,
                activation=activation,
                adapter_init=adapter_init,
                box_sizes=_box_sizes(pair.student.stride, steps, size_per_stride),
            )
            for pair in self.pairs
        )


def _box_sizes(stride: float, steps: Sequence[float], size_per_stride: float) -> tuple[float, float]:
    """Sizes of the boxes that belong to a stride, px; levels that share a stride share its boxes."""
    coarser = [step for step in steps if step > stride]
    smallest = 0.0 if not steps or stride == steps[0] else stride * size_per_stride
    return smallest, min(coarser) * size_per_stride if coarser else math.inf
