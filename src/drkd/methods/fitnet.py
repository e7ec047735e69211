"""FitNet's hint on the pyramid: the plainest feature distillation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, KDMethod
from drkd.losses import AdapterInit, HintLoss
from drkd.methods.levels import MissingLevels, match_levels, paired_maps
from drkd.methods.term_weights import choose_weight


class FitNet(KDMethod):
    """Regress the teacher's maps from the student's (FitNets, arXiv:1412.6550), see `HintLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``hint``; None is 1.
        always_adapt: Put a 1x1 convolution on the student's side even where the channels are equal, as FitNets do.
        adapter_init: Its start, see `make_adapter`.
        levels: Student levels to use; None is all.
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
        always_adapt: bool = True,
        adapter_init: AdapterInit = "identity",
        levels: Sequence[str] | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.weights = {"hint": choose_weight(weight, balanced=balanced, plain=1.0)}
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        self.losses = nn.ModuleList(
            HintLoss(pair.student.channels, pair.teacher.channels, always_adapt=always_adapt, adapter_init=adapter_init)
            for pair in self.pairs
        )

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level: ``hint/<level>``."""
        maps = paired_maps(self.pairs, student, teacher)
        return {f"hint/{name}": loss(*pair) for loss, (name, *pair) in zip(self.losses, maps, strict=True)}
