"""torchvision's RetinaNet classification head with the focal loss's two constants as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import sigmoid_focal_loss


class FocalClassificationHead(RetinaNetClassificationHead):
    """The same parameters and outputs as torchvision's head; only the training loss differs (arXiv:1708.02002, eq. 5).

    With alpha 0.25 and gamma 2 it equals torchvision's, computed for all images at once. On few images of classes that
    look alike, gamma 2 holds the classes at chance for long: what pushes a wrong class down grows with its squared
    probability, and there is hardly any while all classes are unlikely.

    Args:
        in_channels: Channels of a level.
        num_anchors: Anchors a cell.
        num_classes: Classes.
        norm_layer: Norm of the convolutions, or None.
        alpha: Weight of the foreground, in [0, 1].
        gamma: Focusing, >= 0; 0 is plain cross-entropy.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        *,
        norm_layer: Callable[..., nn.Module] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(in_channels, num_anchors, num_classes, norm_layer=norm_layer)
        self.alpha = alpha
        self.gamma = gamma

    @classmethod
    def replacing(cls, plain: RetinaNetClassificationHead, *, alpha: float, gamma: float) -> FocalClassificationHead:
        """A head of the layers that a plain one has, whatever its norms, for the plain one's place."""
        with torch.random.fork_rng(devices=()):
            # Of one channel: its own layers give way, and no random numbers are used up.
            head = cls(1, 1, plain.num_classes, alpha=alpha, gamma=gamma)
        head.conv, head.cls_logits, head.num_anchors = plain.conv, plain.cls_logits, plain.num_anchors
        return head

    def compute_loss(
        self, targets: Sequence[dict[str, Tensor]], head_outputs: dict[str, Tensor], matched_idxs: Sequence[Tensor]
    ) -> Tensor:
        """Focal loss over an image's anchors, divided by its foreground anchors, averaged over images."""
        logits = head_outputs["cls_logits"]
        matched = torch.stack(list(matched_idxs))
        foreground = matched >= 0
        wanted = self._classes(targets, matched)
        truth = functional.one_hot(wanted, logits.shape[2]).to(logits.dtype) * foreground.unsqueeze(2)
        losses = sigmoid_focal_loss(logits, truth, alpha=self.alpha, gamma=self.gamma, reduction="none").sum(dim=2)
        counted = losses.masked_fill(matched == self.BETWEEN_THRESHOLDS, 0.0).sum(dim=1)
        return (counted / foreground.sum(dim=1).clamp_min(1)).mean()

    @staticmethod
    def _classes(targets: Sequence[dict[str, Tensor]], matched: Tensor) -> Tensor:
        """Class of each anchor's box, (B, A); 0 where there is none."""
        labels: list[Any] = [target["labels"] for target in targets]
        counts = [len(own) for own in labels]
        starts = torch.tensor([sum(counts[:place]) for place in range(len(counts))])
        starts = starts.to(matched.device, non_blocking=True)
        # A last label for batches without any box, which no anchor is matched with.
        every = torch.cat([*labels, labels[0].new_zeros(1)])
        return every[(matched.clamp_min(0) + starts.unsqueeze(1)).clamp_max(len(every) - 1)]
