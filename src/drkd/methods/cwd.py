"""CWD: where each channel fires is distilled."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from drkd.contracts import DetectionBatch, DetectorOutput, DetectorSpec, KDMethod
from drkd.losses import ChannelWiseLoss
from drkd.methods.levels import MissingLevels, match_levels, paired_maps
from drkd.methods.term_weights import choose_weight


class CWD(KDMethod):
    """Compare the channels' distributions over space (CWD, arXiv:2011.13256), see `ChannelWiseLoss`.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: Of the term ``cwd``. None is 1 with ``balanced``, else mmrazor's 10 (another port has 5 for RetinaNet).
        temperature: tau, units of the feature.
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
        temperature: float = 1.0,
        levels: Sequence[str] | None = None,
        missing_levels: MissingLevels = "skip",
        balanced: bool = True,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        self.weights = {"cwd": choose_weight(weight, balanced=balanced, plain=10.0)}
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        self.losses = nn.ModuleList(
            ChannelWiseLoss(pair.student.channels, pair.teacher.channels, temperature=temperature)
            for pair in self.pairs
        )

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level: ``cwd/<level>``."""
        maps = paired_maps(self.pairs, student, teacher)
        return {f"cwd/{name}": loss(*pair) for loss, (name, *pair) in zip(self.losses, maps, strict=True)}
