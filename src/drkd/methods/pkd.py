"""PKD: feature distillation by correlation, blind to magnitude."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, KDMethod
from drkd.losses import AdapterInit, PearsonLoss
from drkd.methods.levels import MissingLevels, match_levels, paired_maps
from drkd.methods.term_weights import choose_weight


class PKD(KDMethod):
    """Compare standardised maps (PKD, arXiv:2207.02039), see `PearsonLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``pkd``. None is 1 with ``balanced``, else the authors' 10 for RetinaNet (Faster R-CNN: 6).
        finest_levels: How many levels, finest first, are distilled (authors: 4); None is all.
        adapter_init: Start of the 1x1 convolution that is there where the channels differ, see `make_adapter`.
        levels: Student levels to choose from; None is all.
        missing_levels: Of a level whose stride the teacher lacks: "skip" it, or take the "nearest"; see `match_levels`.
        balanced: Whether the weight is a gradient ratio, see `KDMethod`.
        warmup_steps: See `KDMethod`.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None = None,
        finest_levels: int | None = 4,
        adapter_init: AdapterInit = "identity",
        levels: Sequence[str] | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.weights = {"pkd": choose_weight(weight, balanced=balanced, plain=10.0)}
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.pairs = match_levels(student, teacher, names=levels, missing=missing_levels)[:finest_levels]
        self.losses = nn.ModuleList(
            PearsonLoss(pair.student.channels, pair.teacher.channels, adapter_init=adapter_init) for pair in self.pairs
        )

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level: ``pkd/<level>``."""
        maps = paired_maps(self.pairs, student, teacher)
        return {f"pkd/{name}": loss(*pair) for loss, (name, *pair) in zip(self.losses, maps, strict=True)}
