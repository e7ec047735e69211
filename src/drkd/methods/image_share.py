"""Which of a batch's images a teacher's head, which is dear, is asked about, and when."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drkd.contracts import BoxTargets

WHOLE_RUN = (0.0, 1.0)


def check_span(span: Sequence[float]) -> tuple[float, float]:
    """A part of the run, from where to where.

    Raises:
        ValueError: If it is none.
    """
    try:
        begin, end = (float(place) for place in span)
        if 0 <= begin < end <= 1:
            return begin, end
    except (TypeError, ValueError):
        pass
    raise ValueError(f"Expected a span (DRKD's response_span) as [begin, end] with 0 <= begin < end <= 1, got {span}")


class ImageShare:
    """A part of every batch, or of the passes where that is less than one image, or of the run.

    The first images are taken; a loader that shuffles gives every image its turn. Where the share is
    less than one image of a batch, whole passes are left out: one image counts at every 1 / (share x batch) passes and
    at those where gradients are measured, and as much more.

    Args:
        share: Of a batch's images, in (0, 1].
        with_boxes: Pass over images without boxes while there are others, for terms that have nothing to say there.
        span: From which part of the run to which part passes count; passes where gradients are measured always do.
            Another than the whole run needs a run of known length, see ``needs_run_length`` of `KDMethod`.

    Raises:
        ValueError: If the share or the span is out of range.
    """

    def __init__(self, share: float, *, with_boxes: bool, span: tuple[float, float] = WHOLE_RUN) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"Expected a share above 0 and of at most 1, got {share}")
        self.share = share
        self.with_boxes = with_boxes
        self.span = check_span(span)
        self._turn: int | None = None
        self._outside = False

    @property
    def everything(self) -> bool:
        """Whether all images of all passes count."""
        return self.share == 1 and self.span == WHOLE_RUN

    def begin_pass(self, number: int, *, measured: bool, progress: float | None = None) -> None:
        """See `KDMethod`; without it every pass counts."""
        self._turn = None if measured else number
        begin, end = self.span
        inside = progress is None or (begin <= progress and (progress < end or end == 1))
        self._outside = not measured and not inside

    def factor(self, count: int) -> float:
        """By how much the terms of this pass, of so many images, count; 0 leaves it out."""
        if self._outside:
            return 0.0
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
