"""What the methods on feature maps have in common: a loss a level, and all of them one term."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from drkd.contracts import Decay, DetectionBatch, DetectorOutput, DetectorSpec, KDMethod
from drkd.methods.levels import Levels, MissingLevels, finest, match_levels, paired_maps
from drkd.methods.term_weights import by_stages, choose_weight


class LevelwiseMethod(KDMethod):
    """A loss a level on the maps of student and teacher, called ``<term>/<student level>``.

    A subclass states all its arguments, so that help and recipes show them, and fills ``losses``: one for each of
    ``pairs``, called with the student's and the teacher's map, and with the boxes too where ``reads_boxes`` is set.

    Args:
        student: The student's levels.
        teacher: The teacher's levels; matched to the student's by stride.
        weight: What the user gave; None is 1 with ``balanced``, else ``plain_weight``, or that of two stages.
        finest_levels: How many of the pairs are used, finest first; None is all.
        levels: Student levels to use, or pairs with the teacher's, see `match_levels`; None is all.
        missing_levels: See `match_levels`.
        balanced: See `KDMethod`.
        warmup_steps: See `KDMethod`.
        decay: See `KDMethod`.

    Attributes:
        term: Name of the term.
        plain_weight: The authors' multiplier.
        plain_two_stage: The same for students of two stages; None is no other.
        reads_boxes: Whether the losses take the boxes.
        pairs: The matched levels, finest first.
        losses: One a pair.

    Raises:
        DrkdError: If the pyramids do not match.
        ValueError: If the weight is not above 0.
    """

    term: ClassVar[str]
    plain_weight: ClassVar[float] = 1.0
    plain_two_stage: ClassVar[float | None] = None
    reads_boxes: ClassVar[bool] = False
    losses: nn.ModuleList

    def __init__(
        self,
        student: DetectorSpec,
        teacher: DetectorSpec,
        *,
        weight: float | None,
        levels: Levels | None,
        missing_levels: MissingLevels,
        balanced: bool,
        warmup_steps: int,
        decay: Decay,
        finest_levels: int | None = None,
    ) -> None:
        super().__init__()
        plain = self.plain_weight
        if self.plain_two_stage is not None:
            plain = by_stages(student, plain, self.plain_two_stage)
        self.weights = {self.term: choose_weight(weight, balanced=balanced, plain=plain)}
        self.minimum_boxes = {}
        self.balanced = balanced
        self.warmup_steps = warmup_steps
        self.decay: Decay = decay
        pairs = match_levels(student, teacher, names=levels, missing=missing_levels)
        self.pairs = finest(pairs, finest_levels, name="finest_levels")

    def forward(self, student: DetectorOutput, teacher: DetectorOutput, batch: DetectionBatch) -> dict[str, Tensor]:
        """One term a level: ``<term>/<level>``."""
        levels = zip(self.losses, paired_maps(self.pairs, student, teacher), strict=True)
        where = {"boxes": batch.boxes, "image_size": batch.image_size} if self.reads_boxes else {}
        return {f"{self.term}/{name}": loss(*maps, **where) for loss, (name, *maps) in levels}
