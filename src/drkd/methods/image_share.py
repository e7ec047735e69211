"""Which of a batch's images a teacher's head, which is dear, is asked about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.contracts import BoxTargets


class ImageShare:
    """A part of every batch, or of the passes where that is less than one image.

    The first images are taken; a loader that shuffles gives every image its turn. Where the share is
    less than one image of a batch, whole passes are left out: one image counts at every 1 / (share x batch) passes and
    at those where gradients are measured, and as much more.

    Args:
        share: Of a batch's images, in (0, 1].
        with_boxes: Pass over images without boxes while there are others, for terms that have nothing to say there.

    Raises:
        ValueError: If the share is out of range.
    """

    def __init__(self, share: float, *, with_boxes: bool) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"Expected a share above 0 and of at most 1, got {share}")
        self.share = share
        self.with_boxes = with_boxes
        self._turn: int | None = None

    def begin_pass(self, number: int, *, measured: bool) -> None:
        """See `KDMethod`; without it every pass counts."""
        self._turn = None if measured else number

    def factor(self, count: int) -> float:
        """By how much the terms of this pass, of so many images, count; 0 leaves it out."""
        images = self.share * count
        if images >= 1 or self._turn is None:
            return 1.0
        # Whether, over the passes, a whole image has come together.
        return 1 / images if int((self._turn + 1) * images) > int(self._turn * images) else 0.0

    def rows(self, targets: Sequence[BoxTargets]) -> Sequence[int]:
        """Places of the images in the batch."""
        count = len(targets)
        if self.share == 1:
            return range(count)
        # Boxes are counted on the host.
        places = [row for row, target in enumerate(targets) if len(target.labels)] if self.with_boxes else []
        places = places or [*range(count)]
        return places[: max(1, round(self.share * count))]


def pick_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a batch, by views: an index tensor would have to reach the device first."""
    if len(rows) == len(values):
        return values
    return torch.cat([values[row : row + 1] for row in rows])
